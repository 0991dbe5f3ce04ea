//! The Unix socket: private to its owner, and taken over only from a daemon that is gone.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use tokio::net::{UnixListener, UnixStream};

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("another nestd listens on {0}; stop it, or name another path with --listen unix:PATH")]
    InUse(PathBuf),
    #[error("{0} exists and is not a socket; remove it, or name another path with --listen unix:PATH")]
    NotASocket(PathBuf),
    #[error("{0} is not a directory of this user's own; name another path with --listen unix:PATH")]
    ForeignDirectory(PathBuf),
    #[error("cannot listen on {path}; name another path with --listen unix:PATH")]
    Io { path: PathBuf, source: io::Error },
}

/// A listening socket whose file goes when this does.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    pub(crate) listener: UnixListener,
    /// Which file is ours: a later daemon may have put its own at the same path.
    inode: (u64, u64),
}

impl Socket {
    /// Listens on `path`, creating its directory. A socket that nobody answers on is replaced.
    pub async fn bind(path: &Path) -> Result<Self, SocketError> {
        let io = |source| SocketError::Io { path: path.into(), source };
        if let Some(dir) = path.parent().filter(|d| !d.as_os_str().is_empty()) {
            prepare_directory(dir).map_err(io)?.then_some(()).ok_or(SocketError::ForeignDirectory(dir.into()))?;
        }
        match fs::symlink_metadata(path) {
            Ok(m) if !m.file_type().is_socket() => return Err(SocketError::NotASocket(path.into())),
            Ok(_) => match UnixStream::connect(path).await {
                Ok(_) => return Err(SocketError::InUse(path.into())),
                Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
                    tracing::info!(path = %path.display(), "replacing the socket of a daemon that is gone");
                }
                Err(e) => return Err(io(e)),
            },
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(io(e)),
        }
        // Bound under another name and then renamed, so that nobody can connect before the mode is set, and a
        // stale socket is replaced in one step.
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}", std::process::id()));
        let temporary = PathBuf::from(temporary);
        let bound = (|| {
            let listener = UnixListener::bind(&temporary)?;
            fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
            let meta = fs::symlink_metadata(&temporary)?;
            fs::rename(&temporary, path)?;
            Ok(Self { path: path.into(), listener, inode: (meta.dev(), meta.ino()) })
        })();
        bound.map_err(|e| {
            let _ = fs::remove_file(&temporary);
            io(e)
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Splits off what removes the file, so that the listener can be consumed.
    pub(crate) fn into_parts(self) -> (UnixListener, SocketFile) {
        let file = SocketFile { path: self.path, inode: self.inode };
        (self.listener, file)
    }
}

#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes the directory if need be; false if somebody else could swap files in it under us.
fn prepare_directory(dir: &Path) -> io::Result<bool> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let meta = fs::metadata(dir)?;
    const STICKY: u32 = 0o1000;
    let mine = meta.uid() == rustix::process::geteuid().as_raw() || meta.uid() == 0;
    Ok(mine && (meta.mode() & 0o022 == 0 || meta.mode() & STICKY != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_live_socket_is_refused_and_a_dead_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/nestd.sock");
        let first = Socket::bind(&path).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(Socket::bind(&path).await, Err(SocketError::InUse(_))));
        // A daemon that was killed leaves its file behind.
        drop(first);
        assert!(path.exists());
        let (_listener, file) = Socket::bind(&path).await.unwrap().into_parts();
        drop(file);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Socket::bind(&path).await, Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn the_file_of_a_later_daemon_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nestd.sock");
        let (listener, file) = Socket::bind(&path).await.unwrap().into_parts();
        drop(listener);
        let _second = Socket::bind(&path).await.unwrap();
        drop(file);
        assert!(path.exists());
    }
}
