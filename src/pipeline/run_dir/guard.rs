//! One process a run, and a run that ends when its folder is taken away under it.

use super::RunDir;
use crate::bail;
use crate::checkpoint::atomic::storage_error;
use crate::checkpoint::sums;
use crate::error::Result;
use std::fs;
use std::path::Path;

const LOCK: &str = ".lock";
const GO_ON: &str = "find out what took it away; the same command goes on from the last checkpoint that is left";

impl RunDir {
    /// Refuses to write a stage's checkpoint when the folder is no longer there, or no longer this process's.
    pub fn prove_there(&self, stage_dir: &Path) -> Result<()> {
        if !stage_dir.is_dir() {
            bail!("{} has gone while the run was under way", stage_dir.display(); "{GO_ON}")
        }
        if !self.lock_in_place() {
            bail!("{} has been removed, moved or taken over while the run was under way: its .lock is not the one that this process holds",
                self.root.display(); "{GO_ON}")
        }
        Ok(())
    }

    /// Refuses to go on when a file that the run has written is no longer there.
    pub fn prove_whole(&self) -> Result<()> {
        let Some(listed) = self.listed() else { return Ok(()) };
        let files = listed.now.names().chain(listed.weights.iter().map(String::as_str)).chain([sums::FILE]);
        match files.map(|name| self.root.join(name)).find(|p| !p.is_file()) {
            None => Ok(()),
            Some(gone) => bail!("{} has gone while the run was under way", gone.display(); "{GO_ON}"),
        }
    }

    fn lock_in_place(&self) -> bool {
        let path = self.root.join(LOCK);
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let id = |m: fs::Metadata| (m.dev(), m.ino());
            let held = self.lock.as_ref().map(|f| f.metadata().map(id));
            held.is_none_or(|held| matches!((held, fs::metadata(&path).map(id)), (Ok(a), Ok(b)) if a == b))
        }
        #[cfg(not(unix))]
        path.exists()
    }
}

/// Does another process train here?
pub fn is_locked(root: &Path) -> bool {
    let file = fs::OpenOptions::new().write(true).open(root.join(LOCK));
    file.is_ok_and(|f| matches!(f.try_lock(), Err(fs::TryLockError::WouldBlock)))
}

/// Keeps a second process from writing into the same run.
pub fn lock(root: &Path) -> Result<fs::File> {
    let path = root.join(LOCK);
    // What the file holds stays: it may be somebody's.
    let open = fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = open.map_err(|e| storage_error(&path, e))?;
    match file.try_lock() {
        Err(fs::TryLockError::WouldBlock) => {
            bail!("another process is training in {}", root.display(); "wait until it ends, or choose another output_dir")
        }
        // Some network file systems know no locks.
        Err(fs::TryLockError::Error(e)) => tracing::warn!("{}: no lock: {e}", path.display()),
        Ok(()) => {}
    }
    Ok(file)
}
