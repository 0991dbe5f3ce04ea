//! Running nestctl, and a daemon for it to talk to.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread::JoinHandle,
};

use nestd::{
    Daemon, Socket,
    config::{Config, Metrics},
};
use tokio::sync::oneshot;

/// nestctl without the environment's server.
pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nestctl"));
    command.env_remove("NESTD_SERVER").stdin(Stdio::null());
    command
}

pub fn nestctl(args: &[&str]) -> Output {
    command().args(args).output().unwrap()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Standard output of a command that succeeds.
pub fn ok(output: Output) -> String {
    assert!(output.status.success(), "{:?}\n{}\n{}", output.status, stdout(&output), stderr(&output));
    stdout(&output)
}

pub fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e} in {text}"))
}

/// A daemon that lives in this process.
pub struct Server {
    pub address: String,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Server {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nestd.sock");
        let config = Config { metrics: Metrics(None), state_dir: directory.path().join("state"), ..Config::default() };
        let address = format!("unix:{}", path.display());
        let (end, ended) = oneshot::channel();
        let (bound, is_bound) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                let socket = Socket::bind(&path).await.unwrap();
                bound.send(()).unwrap();
                let serve = Daemon::new(config).serve(socket, async {
                    let _ = ended.await;
                });
                serve.await.unwrap();
            });
        });
        is_bound.recv().unwrap();
        Self { address, end: Some(end), thread: Some(thread), _directory: directory }
    }

    /// nestctl with this server.
    pub fn nestctl(&self, args: &[&str]) -> Output {
        command().env("NESTD_SERVER", &self.address).args(args).output().unwrap()
    }

    /// Standard output of a command that succeeds.
    pub fn ok(&self, args: &[&str]) -> String {
        ok(self.nestctl(args))
    }

    /// The same with `--output json`.
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        json(&self.ok(&[args, &["--output", "json"]].concat()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the daemon panicked");
        }
    }
}

/// A file in a directory that goes with it.
pub struct File {
    pub path: PathBuf,
    _directory: tempfile::TempDir,
}

impl File {
    pub fn new(bytes: &[u8]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, bytes).unwrap();
        Self { path, _directory: directory }
    }

    pub fn text(&self) -> &str {
        path_text(&self.path)
    }
}

pub fn path_text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Real-mode guests, position independent.
pub mod guest {
    /// Writes `hi` and a line feed to the serial port, then 0x10 to the debug exit port.
    pub const HELLO: &[u8] = &[
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'h', 0xee, // out dx, 'h'
        0xb0, b'i', 0xee, //
        0xb0, b'\n', 0xee, //
        0xb0, 0x10, 0xe6, 0xf4, // out 0xf4, 0x10
        0xeb, 0xfe, // jmp $
    ];
    /// Writes back what it reads from the serial port, and exits with 0 after a `q`.
    pub const ECHO: &[u8] = &[
        0xba, 0xfd, 0x03, 0xec, // in al, 0x3fd
        0xa8, 0x01, 0x74, 0xf8, // until there is data
        0xba, 0xf8, 0x03, 0xec, 0xee, // in al, 0x3f8; out 0x3f8, al
        0x3c, b'q', 0x75, 0xef, // until 'q'
        0xb0, 0x00, 0xe6, 0xf4, // out 0xf4, 0
        0xeb, 0xfe,
    ];
    /// Runs for ever.
    pub const SPIN: &[u8] = &[0xeb, 0xfe];
}
