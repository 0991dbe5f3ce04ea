//! The daemon's configuration: defaults, then the file, then the flags.

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use serde::Deserialize;

use crate::units::{ByteSize, deserialize_time};

/// Everything that can be configured. An unknown key in the file is an error, not a surprise later.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub listen: Listen,
    pub metrics: Metrics,
    /// Where dumps of failed VMs are written.
    pub state_dir: PathBuf,
    pub log: Log,
    pub limits: Limits,
    pub timeouts: Timeouts,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: Listen::default(),
            metrics: Metrics::default(),
            state_dir: default_state_dir(),
            log: Log::default(),
            limits: Limits::default(),
            timeouts: Timeouts::default(),
        }
    }
}

/// The gRPC address, written `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Listen(pub PathBuf);

impl Default for Listen {
    fn default() -> Self {
        Self(default_socket())
    }
}

impl FromStr for Listen {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.strip_prefix("unix:") {
            // The `unix://` form of URLs names the same path.
            Some(path) if !path.trim_start_matches("//").is_empty() => {
                Ok(Self(path.strip_prefix("//").unwrap_or(path).into()))
            }
            _ => Err(ConfigError::Listen(text.into())),
        }
    }
}

impl TryFrom<String> for Listen {
    type Error = ConfigError;
    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix:{}", self.0.display())
    }
}

/// Where `/metrics` is served: a loopback address, or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Metrics(pub Option<SocketAddr>);

impl Default for Metrics {
    fn default() -> Self {
        Self(Some(SocketAddr::from(([127, 0, 0, 1], 9641))))
    }
}

impl FromStr for Metrics {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if text == "off" {
            return Ok(Self(None));
        }
        // Metrics carry no authentication: they do not leave the machine.
        let address: Option<SocketAddr> = text.parse().ok().filter(|a: &SocketAddr| a.ip().is_loopback());
        address.map(|a| Self(Some(a))).ok_or_else(|| ConfigError::Metrics(text.into()))
    }
}

impl TryFrom<String> for Metrics {
    type Error = ConfigError;
    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    pub format: LogFormat,
    /// tracing-subscriber's filter syntax: a level, or `target=level` pairs.
    pub filter: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".into() }
    }
}

/// What one daemon hosts at most. Past a limit a call gets RESOURCE_EXHAUSTED with the limit's name.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    pub max_vms: u32,
    pub max_cpus_per_vm: u32,
    pub max_memory_per_vm: ByteSize,
    /// Sum over all VMs.
    pub max_memory: ByteSize,
    /// Kernel, modules and flat images of one VM together.
    pub max_image: ByteSize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_vms: 64,
            max_cpus_per_vm: nestd_vcpu::spec::MAX_CPUS,
            max_memory_per_vm: ByteSize(nestd_vcpu::spec::MAX_MEMORY_BYTES),
            max_memory: ByteSize(256 << 30),
            max_image: ByteSize(256 << 20),
        }
    }
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// The longest a unary call may take; a client's own deadline can only be shorter.
    #[serde(deserialize_with = "deserialize_time")]
    pub unary: Duration,
    /// How often an idle connection is probed.
    #[serde(deserialize_with = "deserialize_time")]
    pub keepalive: Duration,
    /// How long the daemon waits, once told to end, for VMs to stop and calls to finish.
    #[serde(deserialize_with = "deserialize_time")]
    pub drain: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { unary: Duration::from_secs(30), keepalive: Duration::from_secs(20), drain: Duration::from_secs(10) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("`{0}` is not an address to listen on; write unix:PATH")]
    Listen(String),
    #[error("`{0}` is not a metrics address; write a loopback address with a port, such as 127.0.0.1:9641, or off")]
    Metrics(String),
    #[error("cannot read the configuration file {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the configuration file {path} is wrong")]
    Parse { path: PathBuf, source: toml::de::Error },
}

impl Config {
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.into(), source })
    }
}

/// Where `nestd` listens and `nestctl` looks when nobody says otherwise.
pub fn default_socket() -> PathBuf {
    runtime_dir().join("nestd.sock")
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn env_dir(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute())
}

fn runtime_dir() -> PathBuf {
    if is_root() {
        return "/run/nestd".into();
    }
    // Without a session there is no runtime directory; the user's own name keeps others' sockets apart.
    env_dir("XDG_RUNTIME_DIR").map_or_else(
        || std::env::temp_dir().join(format!("nestd-{}", rustix::process::geteuid().as_raw())),
        |dir| dir.join("nestd"),
    )
}

fn default_state_dir() -> PathBuf {
    if is_root() {
        return "/var/lib/nestd".into();
    }
    env_dir("XDG_STATE_HOME")
        .or_else(|| env_dir("HOME").map(|home| home.join(".local/state")))
        .map_or_else(runtime_dir, |dir| dir.join("nestd"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_overrides_defaults_and_leaves_the_rest() {
        let config: Config = toml::from_str(
            r#"
            listen = "unix:/tmp/x.sock"
            metrics = "off"
            [limits]
            max_vms = 3
            max_memory_per_vm = "1G"
            [timeouts]
            unary = "250ms"
            [log]
            format = "json"
            "#,
        )
        .unwrap();
        assert_eq!(config.listen, Listen("/tmp/x.sock".into()));
        assert_eq!(config.metrics, Metrics(None));
        assert_eq!(config.limits.max_vms, 3);
        assert_eq!(config.limits.max_memory_per_vm, ByteSize(1 << 30));
        assert_eq!(config.timeouts.unary, Duration::from_millis(250));
        assert_eq!(config.timeouts.drain, Duration::from_secs(10));
        assert_eq!(config.log.format, LogFormat::Json);
    }

    #[test]
    fn the_deployed_example_shows_the_defaults() {
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/nestd.toml");
        let (example, default) = (Config::read(&example).unwrap(), Config::default());
        assert_eq!(example.metrics, default.metrics);
        let parts = |c: &Config| format!("{:?} {:?} {:?}", c.log, c.limits, c.timeouts);
        assert_eq!(parts(&example), parts(&default));
    }

    #[test]
    fn a_wrong_file_is_refused_with_the_key_or_value_that_is_wrong() {
        for (text, names) in [
            ("lisen = \"unix:/x\"", "lisen"),
            ("[limits]\nmax_vm = 1", "max_vm"),
            ("listen = \"tcp:1\"", "unix:PATH"),
            ("metrics = \"0.0.0.0:1\"", "loopback"),
            ("[limits]\nmax_memory = \"many\"", "many"),
        ] {
            let error = toml::from_str::<Config>(text).unwrap_err().to_string();
            assert!(error.contains(names), "{text}: {error}");
        }
    }

    #[test]
    fn listen_takes_both_spellings_of_a_unix_address() {
        assert_eq!("unix:/a/b".parse::<Listen>().unwrap(), Listen("/a/b".into()));
        assert_eq!("unix:///a/b".parse::<Listen>().unwrap(), Listen("/a/b".into()));
        assert!("unix:".parse::<Listen>().is_err());
        assert!("/a/b".parse::<Listen>().is_err());
    }
}
