//! The real binary: signals, sockets, configuration, logs.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use nestd_proto::v1::{self, vm_service_client::VmServiceClient};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, ChildStderr},
};

use crate::rig::{connect, guest, in_time, request};

struct Nestd {
    child: Child,
    log: BufReader<ChildStderr>,
}

fn command(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nestd"));
    command.arg("--listen").arg(format!("unix:{}", directory.join("nestd.sock").display()));
    command.args(["--metrics", "127.0.0.1:0", "--log-format", "json", "--state-dir"]);
    command.arg(directory.join("state")).env_remove("NESTD_LOG").stderr(Stdio::piped());
    command
}

impl Nestd {
    /// Started, and past the line that says that it serves.
    async fn start(directory: &Path) -> Self {
        let mut child = tokio::process::Command::from(command(directory)).kill_on_drop(true).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let mut nestd = Self { child, log };
        nestd.log_line("serves").await;
        nestd
    }

    /// The next line of the log that has `text`.
    async fn log_line(&mut self, text: &str) -> String {
        loop {
            let mut line = String::new();
            let n = in_time(self.log.read_line(&mut line)).await.unwrap();
            assert!(n > 0, "the log ended without {text:?}");
            assert!(line.starts_with('{') && line.trim_end().ends_with('}'), "not JSON: {line}");
            if line.contains(text) {
                return line;
            }
        }
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().unwrap().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }
}

#[tokio::test]
async fn sigterm_stops_running_vms_ends_streams_and_removes_the_socket() {
    let directory = tempfile::tempdir().unwrap();
    let mut nestd = Nestd::start(directory.path()).await;
    let socket = directory.path().join("nestd.sock");
    let mut vms = VmServiceClient::new(connect(&socket).await);
    for name in ["a", "b"] {
        vms.create(request(name, guest::SPIN)).await.unwrap();
        vms.start(v1::StartVmRequest { name: name.into() }).await.unwrap();
    }
    let mut watch = vms.watch(v1::WatchVmRequest { name: "a".into() }).await.unwrap().into_inner();
    nestd.signal("-TERM");
    let mut last = None;
    while let Some(vm) = in_time(watch.message()).await.unwrap() {
        last = Some(vm.state());
    }
    assert_eq!(last, Some(v1::VmState::Stopped));
    assert!(in_time(nestd.child.wait()).await.unwrap().success());
    assert!(!socket.exists());
    let mut log = String::new();
    nestd.log.read_to_string(&mut log).await.unwrap();
    assert!(log.contains("SIGTERM") && log.contains("nestd ends"), "{log}");
}

#[tokio::test]
async fn a_failed_vm_leaves_its_dump_in_the_state_directory() {
    let directory = tempfile::tempdir().unwrap();
    let mut nestd = Nestd::start(directory.path()).await;
    let mut vms = VmServiceClient::new(connect(&directory.path().join("nestd.sock")).await);
    vms.create(request("bad", guest::TRIPLE_FAULT)).await.unwrap();
    vms.start(v1::StartVmRequest { name: "bad".into() }).await.unwrap();
    nestd.log_line("dump is written").await;
    let mut dumps = std::fs::read_dir(directory.path().join("state/dumps")).unwrap();
    let dump = dumps.next().expect("a dump").unwrap();
    assert!(dump.file_name().to_str().unwrap().starts_with("bad-"));
    assert!(std::fs::read_to_string(dump.path()).unwrap().contains("triple fault"));
}

#[tokio::test]
async fn a_killed_daemons_socket_is_taken_over_and_a_living_ones_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let mut first = Nestd::start(directory.path()).await;
    first.signal("-KILL");
    in_time(first.child.wait()).await.unwrap();
    assert!(directory.path().join("nestd.sock").exists());
    let _second = Nestd::start(directory.path()).await;
    let refused = command(directory.path()).output().unwrap();
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && error.contains("another nestd listens"), "{error}");
}

#[test]
fn a_wrong_configuration_is_refused_with_file_key_and_what_to_write() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("nestd.toml");
    for (text, said) in [("[limits]\nmax_vm = 3\n", "max_vm"), ("metrics = \"0.0.0.0:80\"\n", "loopback")] {
        std::fs::write(&file, text).unwrap();
        let output = command(directory.path()).arg("--config").arg(&file).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{text}");
        assert!(error.contains("nestd.toml") && error.contains(said), "{error}");
    }
}
