//! Files and folders that are there whole or not at all: written beside their place, synced, then renamed into it.
//!
//! Whatever goes wrong while writing (a full disk, a kill, a crash), what was there before stays as it was. A folder is
//! replaced only if everything in it was written here: others' files are never removed.

use super::sums::{self, Sums, hex};
use crate::bail;
use crate::error::{Context, Error, Result};
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use tempfile::{Builder, TempPath};

/// Writes where a user has said, by [`write()`] to a file. Of a symbolic link, the file that it points to is written. What
/// is no file (a device, a pipe, `/dev/stdout`) is not replaced but written to as it is.
pub fn write_out(path: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    match place(path).map_err(|e| storage_error(path, e))? {
        Place::File(file) => write(&file, fill),
        Place::Stream => {
            let stream = File::options().append(true).open(path).map_err(|e| storage_error(path, e))?;
            filled(path, stream, fill).map(drop)
        }
    }
}

/// Refuses a path for [`write_out`] where something stands that is not `what`, as `ours` knows it by its first line: a command
/// that writes its results never replaces a user's file. An empty file, a device and a pipe are free.
///
/// # Errors
/// Another file is there; it cannot be read; it is a folder.
pub fn free_for(path: &Path, what: &str, ours: impl Fn(&str) -> bool) -> Result<()> {
    let Place::File(file) = place(path).map_err(|e| storage_error(path, e))? else { return Ok(()) };
    if file.is_dir() {
        bail!("{} is a folder", path.display(); "name a file")
    }
    let mut first = Vec::new();
    match File::open(&file) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        // A line of ours may be long, but no longer than this.
        open => open.and_then(|f| BufReader::new(f.take(1 << 24)).read_until(b'\n', &mut first)),
    }
    .with_context(|| format!("cannot read {}, which would be replaced", path.display()))?;
    if first.is_empty() || ours(&String::from_utf8_lossy(&first)) {
        return Ok(());
    }
    bail!("{} is there already, and it holds no {what}: it is not replaced", path.display();
        "choose another name, or move the file away")
}

/// The file that [`write_out`] writes for a path, its links followed; none where it is a device or a pipe.
pub fn file_of(path: &Path) -> Result<Option<PathBuf>> {
    match place(path).map_err(|e| storage_error(path, e))? {
        Place::File(file) => Ok(Some(file)),
        Place::Stream => Ok(None),
    }
}

/// Where the bytes for a path go.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// To a file of this path, there or not, which is no link.
    File(PathBuf),
    /// To what is there already and cannot be replaced.
    Stream,
}

/// Follows links as far as they are names in a file system: those to open descriptors (`/dev/stdout`) are not.
fn place(path: &Path) -> std::io::Result<Place> {
    match fs::metadata(path) {
        // A folder is left for the renaming to refuse.
        Ok(m) if !m.is_file() && !m.is_dir() => return Ok(Place::Stream),
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = path.to_path_buf();
    loop {
        let dir = parent(&file);
        if fs::canonicalize(dir).is_ok_and(|d| ["/proc", "/dev/fd"].iter().any(|open| d.starts_with(open))) {
            return Ok(Place::Stream);
        }
        // The links have an end: `metadata` has walked them all.
        match fs::read_link(&file) {
            Ok(target) => file = dir.join(target),
            Err(_) => return Ok(Place::File(file)),
        }
    }
}

/// Writes a file through `fill`; it appears at `path`, in the place of what was there, when all of it is on the disk.
pub fn write(path: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    replace(path, fill)
}

/// As [`write()`]; returns the SHA-256 of what was written, in hex.
pub fn write_summed(path: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<String> {
    let mut hash = Sha256::new();
    replace(path, |out| fill(&mut Hashed { inner: out, hash: &mut hash }))?;
    Ok(hex(&hash.finalize()))
}

fn replace(path: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let dir = parent(path);
    fs::create_dir_all(dir).map_err(|e| storage_error(path, e))?;
    let mut builder = Builder::new();
    let prefix = temporary_prefix(path);
    builder.prefix(&prefix).suffix(TMP);
    ordinary_permissions(&mut builder, 0o666);
    let temp = builder.tempfile_in(dir).map_err(|e| storage_error(path, e))?;
    let (file, temp) = temp.into_parts();
    let file = filled(path, file, fill)?;
    file.sync_all().map_err(|e| storage_error(path, e))?;
    drop(file);
    persist(temp, path)?;
    sync_dir(dir).map_err(|e| storage_error(path, e))
}

/// `file` with all that `fill` writes; `path` is for messages.
fn filled(path: &Path, file: File, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<File> {
    // The disk may fill up at any byte; remember the reason, which `fill` may have wrapped in another error.
    let mut sink = Watched { inner: BufWriter::with_capacity(1 << 20, file), failed: None };
    let filled = fill(&mut sink).and_then(|()| Ok(sink.flush()?));
    if let Some(reason) = sink.failed {
        return Err(storage_error(path, reason));
    }
    // What failed otherwise is no matter of writing.
    filled?;
    sink.inner.into_inner().map_err(|e| storage_error(path, e.into_error()))
}

/// Writes bytes, as [`write()`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, |out| Ok(out.write_all(bytes)?))
}

/// Makes a folder through `fill`, which gets an empty folder beside `path`; it takes the place of `path` when everything
/// in it is on the disk.
///
/// # Errors
/// Something is there already, other than an empty folder.
pub fn directory(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if path.is_dir() && entries(path).with_context(|| path.display().to_string())?.is_empty() {
        fs::remove_dir(path).map_err(|e| storage_error(path, e))?;
    }
    if fs::symlink_metadata(path).is_ok() {
        bail!("{} is there already", path.display(); "move it away, or choose another folder")
    }
    make(path, fill)
}

/// As [`directory`], with a list of checksums in the folder: that of the files that `fill` returns, completed by the others. An
/// older folder of that name is moved aside, replaced, then removed, if it holds nothing but what was written by this function.
///
/// # Errors
/// What is there holds files of others, or files that have changed since (the error names them).
pub fn summed_directory(path: &Path, fill: impl FnOnce(&Path) -> Result<Sums>) -> Result<()> {
    let foreign = sums::foreign(path)?;
    if !foreign.is_empty() {
        bail!("{} would be replaced, but it holds what adfreeze did not write, or not like this:\n  {}",
            path.display(), sums::told(&foreign); "move these files away; the same command then goes on")
    }
    make(path, |dir| {
        let mut sums = fill(dir)?;
        sums.complete(dir)?;
        sums.write(dir)
    })
}

fn make(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let dir = parent(path);
    fs::create_dir_all(dir).map_err(|e| storage_error(path, e))?;
    let mut builder = Builder::new();
    let prefix = temporary_prefix(path);
    builder.prefix(&prefix).suffix(TMP);
    ordinary_permissions(&mut builder, 0o777);
    let temp = builder.tempdir_in(dir).map_err(|e| storage_error(path, e))?;
    fill(temp.path()).with_context(|| format!("cannot write {}", path.display()))?;
    sync_tree(temp.path()).map_err(|e| storage_error(path, e))?;
    // The folder for the old version is made (and later removed) by its guard; an empty one is replaced by the rename.
    let aside = builder.suffix(OLD).tempdir_in(dir).map_err(|e| storage_error(path, e))?;
    let replaced = match fs::rename(path, aside.path()) {
        Ok(()) => true,
        Err(e) if e.kind() == ErrorKind::NotFound => false,
        Err(e) => return Err(storage_error(path, e)),
    };
    if let Err(e) = fs::rename(temp.path(), path) {
        if replaced {
            fs::rename(aside.path(), path).map_err(|e| storage_error(path, e))?;
        }
        return Err(storage_error(path, e));
    }
    // Renamed away: there is nothing left for the guard to remove.
    let _ = temp.keep();
    sync_dir(dir).map_err(|e| storage_error(path, e))
}

/// Tidies up in `dir` after a process that was killed: removes what it had not finished, and puts back a folder that it had
/// moved aside but not yet replaced; `ours` tells by a name whether it may be of this program. Nobody else may be writing
/// there. Returns what was removed or put back. What cannot be removed (a network file system may keep files that are open
/// elsewhere) is a warning, and tried again the next time.
pub fn recover(dir: &Path, ours: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let mut done = Vec::new();
    for path in entries(dir).with_context(|| dir.display().to_string())? {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let Some((target, kind)) = temporary_target(name).filter(|(target, _)| ours(target)) else { continue };
        let target = dir.join(target);
        if kind == OLD && !target.exists() && entries(&path).is_ok_and(|e| !e.is_empty()) {
            fs::rename(&path, &target).map_err(|e| storage_error(&path, e))?;
            done.push(target);
            continue;
        }
        match if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) } {
            Ok(()) => done.push(path),
            Err(e) => tracing::warn!("cannot remove {}, which a killed process left: {e}", path.display()),
        }
    }
    Ok(done)
}

/// An error that names the path and, where the disk is the reason, says so.
pub fn storage_error(path: &Path, error: std::io::Error) -> Error {
    let full = matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge);
    let cause = Error::new(format!("cannot write {}", path.display())).source(error);
    if full {
        cause.hint(format!(
            "free space on the disk of {} (or raise the quota) and run the same command again; what was saved before is intact",
            lasting(path).display()
        ))
    } else {
        cause.hint(format!("can this user write to {}?", lasting(path).display()))
    }
}

/// The innermost folder of `path` that is not a temporary one of ours.
fn lasting(path: &Path) -> &Path {
    let temporary = |dir: &Path| dir.iter().any(|c| c.to_str().is_some_and(|name| temporary_target(name).is_some()));
    let dir = path.ancestors().skip(1).find(|dir| !temporary(dir));
    dir.filter(|dir| *dir != Path::new("")).unwrap_or(Path::new("."))
}

/// A writer that hashes what goes through.
struct Hashed<'a> {
    inner: &'a mut dyn Write,
    hash: &'a mut Sha256,
}

impl Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        Ok(n)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// A writer that remembers why the disk refused.
struct Watched<W> {
    inner: W,
    failed: Option<std::io::Error>,
}

impl<W: Write> Watched<W> {
    fn note<T>(&mut self, result: std::io::Result<T>) -> std::io::Result<T> {
        result.inspect_err(|e| {
            let copy = e.raw_os_error().map_or_else(|| e.kind().into(), std::io::Error::from_raw_os_error);
            self.failed = Some(copy);
        })
    }
}

impl<W: Write> Write for Watched<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let result = self.inner.write(bytes);
        self.note(result)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        let result = self.inner.flush();
        self.note(result)
    }
}

fn persist(temp: TempPath, path: &Path) -> Result<()> {
    temp.persist(path).map_err(|e| storage_error(path, e.error))
}

/// Endings of what is being written, and of a folder that is being replaced.
const TMP: &str = ".tmp";
const OLD: &str = ".old";

/// The target and the ending of a name of ours, `.NAME.XXXXXX.tmp` or `.NAME.XXXXXX.old`.
fn temporary_target(name: &str) -> Option<(&str, &'static str)> {
    let kind = [TMP, OLD].into_iter().find(|kind| name.ends_with(kind))?;
    let (target, random) = name.strip_prefix('.')?.strip_suffix(kind)?.rsplit_once('.')?;
    (random.len() == 6 && random.bytes().all(|b| b.is_ascii_alphanumeric())).then_some((target, kind))
}

/// Temporary files of one target begin alike: `.NAME.`.
fn temporary_prefix(path: &Path) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(path.file_name().unwrap_or_default());
    prefix.push(".");
    prefix
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    }
}

/// Temporary files are private by default; ours become results that others may read, as the umask says.
#[cfg(unix)]
fn ordinary_permissions(builder: &mut Builder<'_, '_>, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    builder.permissions(fs::Permissions::from_mode(mode));
}

#[cfg(not(unix))]
fn ordinary_permissions(_: &mut Builder<'_, '_>, _: u32) {}

/// Syncs every file and folder below `dir`, and `dir` itself.
fn sync_tree(dir: &Path) -> std::io::Result<()> {
    for entry in entries(dir)? {
        if entry.is_dir() { sync_tree(&entry)? } else { File::open(&entry)?.sync_all()? }
    }
    sync_dir(dir)
}

/// What is in `dir`, sorted.
fn entries(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut entries: Vec<PathBuf> = fs::read_dir(dir)?.map(|e| Ok(e?.path())).collect::<std::io::Result<_>>()?;
    entries.sort();
    Ok(entries)
}

/// Makes a rename in `dir` last; only Unix can open folders.
fn sync_dir(dir: &Path) -> std::io::Result<()> {
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bail;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/state.bin");
        write_bytes(&path, b"old").unwrap();
        let error = write(&path, |out| {
            out.write_all(b"half of the new one")?;
            bail!("the tensor is gone")
        });
        assert!(error.unwrap_err().report().starts_with("the tensor is gone"), "nothing is wrong with writing");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        write_bytes(&path, b"new").unwrap();
        assert_eq!(
            (fs::read(&path).unwrap(), names(&dir.path().join("deep"))),
            (b"new".to_vec(), vec!["state.bin".into()])
        );
    }

    #[test]
    fn a_folder_is_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter");
        let fill = |name: &'static str| {
            move |d: &Path| write_bytes(&d.join("sub").join(name), name.as_bytes()).map(|()| Sums::default())
        };
        summed_directory(&path, fill("a")).unwrap();
        let error = summed_directory(&path, |d| fill("b")(d).and_then(|_| Err(Error::new("stopped"))));
        assert_eq!(error.unwrap_err().cause(), format!("cannot write {}: stopped", path.display()));
        assert_eq!(names(&path.join("sub")), ["a"]);
        summed_directory(&path, fill("c")).unwrap();
        assert_eq!((names(&path.join("sub")), names(dir.path())), (vec!["c".to_string()], vec!["adapter".to_string()]));
        assert_eq!(Sums::read(&path).unwrap().unwrap().names().collect::<Vec<_>>(), ["sub/c"]);
    }

    #[test]
    fn a_folder_with_files_of_others_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("final");
        let fill = |d: &Path| write_bytes(&d.join("a"), b"a");
        fs::create_dir(&path).unwrap();
        directory(&path, fill).unwrap();
        assert!(directory(&path, fill).unwrap_err().report().contains("final is there already"));
        let summed = || summed_directory(&path, |d| fill(d).map(|()| Sums::default()));
        assert!(summed().unwrap_err().report().contains("final/a"), "not listed");
        fs::remove_dir_all(&path).unwrap();
        summed().unwrap();
        summed().unwrap();
        for (name, text) in [("notes.txt", "mine"), ("a", "mended by hand")] {
            write_bytes(&path.join(name), text.as_bytes()).unwrap();
            let report = summed().unwrap_err().report();
            assert!(report.contains(&format!("final/{name}")) && report.contains("hint: move these"), "{report}");
            assert_eq!(fs::read(path.join(name)).unwrap(), text.as_bytes());
            fs::remove_dir_all(&path).unwrap();
            summed().unwrap();
        }
        assert_eq!(names(dir.path()), ["final"]);
    }

    #[test]
    fn results_never_replace_another_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        let free = || free_for(&path, "scores", |line| line.starts_with("{\"id\""));
        free().unwrap();
        for (text, may) in [("", true), ("{\"id\":1}\n", true), ("[{\"id\":1}]", false), ("notes", false)] {
            fs::write(&path, text).unwrap();
            assert_eq!(free().is_ok(), may, "{text}");
        }
        let report = free().unwrap_err().report();
        assert!(report.contains("out.jsonl is there already, and it holds no scores"), "{report}");
        assert!(free_for(dir.path(), "scores", |_| true).unwrap_err().report().contains("is a folder"));
    }

    #[test]
    fn what_a_killed_process_left_is_tidied_up() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in [
            ".state.bin.aB3dE6.tmp",
            ".gone.aB3dE6.old/x",
            ".kept.aB3dE6.old/x",
            "kept/y",
            ".new.aB3dE6.tmp/x",
            ".other.tmp",
            ".mine.aB3dE6.tmp",
        ] {
            write_bytes(&at(name), b"").unwrap();
        }
        assert_eq!(recover(dir.path(), |target| target != "mine").unwrap().len(), 4);
        assert_eq!(names(dir.path()), [".mine.aB3dE6.tmp", ".other.tmp", "gone", "kept"]);
        assert_eq!(names(&at("gone")), ["x"]);
    }

    fn out(path: &Path, bytes: &[u8]) -> Result<()> {
        write_out(path, |w| Ok(w.write_all(bytes)?))
    }

    #[cfg(unix)]
    #[test]
    fn a_link_stays_and_its_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("real")).unwrap();
        std::os::unix::fs::symlink("real/b", at("a")).unwrap();
        std::os::unix::fs::symlink("c", at("real/b")).unwrap();
        // It is not there yet; then it is, and a failure keeps it.
        for text in [b"one" as &[u8], b"two"] {
            out(&at("a"), text).unwrap();
            assert_eq!(fs::read(at("real/c")).unwrap(), text);
            write_out(&at("a"), |_| bail!("stopped")).unwrap_err();
            assert_eq!(fs::read(at("real/c")).unwrap(), text);
        }
        assert!(at("a").is_symlink() && at("real/b").is_symlink() && !at("real/c").is_symlink());
        assert_eq!((names(dir.path()).len(), names(&at("real"))), (2, vec!["b".into(), "c".into()]));
        std::os::unix::fs::symlink("circle", at("circle")).unwrap();
        assert!(out(&at("circle"), b"").unwrap_err().report().contains("circle: "));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_pipe_and_a_device_are_written_to_and_stay() {
        use std::os::unix::fs::FileTypeExt;
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || fs::read(pipe).unwrap()
        });
        out(&pipe, b"through the pipe").unwrap();
        assert_eq!(reader.join().unwrap(), b"through the pipe");
        assert!(fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/dev/full", &link).unwrap();
        let report = out(&link, b"x").unwrap_err().report();
        assert!(report.contains("link: No space left on device"), "{report}");
        assert!(link.is_symlink() && place(Path::new("/dev/full")).unwrap() == Place::Stream);
        // A descriptor is no name, whatever it is open on.
        assert_eq!(place(Path::new("/proc/self/fd/0")).unwrap(), Place::Stream);
        assert_eq!(place(Path::new("/dev/stdout")).unwrap(), Place::Stream);
        assert_eq!(names(dir.path()), ["link", "pipe"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_named_with_what_to_do() {
        let mut full = Watched { inner: File::options().write(true).open("/dev/full").unwrap(), failed: None };
        full.write_all(b"x").unwrap_err();
        let report = storage_error(Path::new("runs/a/state.bin"), full.failed.unwrap()).report();
        assert!(report.starts_with("cannot write runs/a/state.bin: No space left on device"), "{report}");
        assert!(report.contains("hint: free space on the disk of runs/a "), "{report}");
        assert_eq!(lasting(Path::new("runs/.a.aB3dE6.tmp/deep/state.bin")), Path::new("runs"));
        assert_eq!(lasting(Path::new(".a.aB3dE6.tmp/state.bin")), Path::new("."));
    }

    /// Runs itself again in a process that may write files of at most 64 blocks.
    #[cfg(target_os = "linux")]
    #[test]
    fn running_out_of_space_half_way_keeps_the_last_good_file() {
        const DIR: &str = "ADFREEZE_TEST_FULL_DISK";
        if let Some(dir) = std::env::var_os(DIR) {
            let error = write_bytes(&Path::new(&dir).join("state.bin"), &vec![1; 1 << 20]).unwrap_err();
            assert!(error.report().contains("hint: free space on the disk of"), "{}", error.report());
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.bin");
        write_bytes(&path, b"the last good one").unwrap();
        let status = std::process::Command::new("sh")
            .args(["-c", "ulimit -f 64; trap '' XFSZ; exec \"$0\" --exact \"$1\" >/dev/null"])
            .arg(std::env::current_exe().unwrap())
            .arg("checkpoint::atomic::tests::running_out_of_space_half_way_keeps_the_last_good_file")
            .env(DIR, dir.path())
            .status()
            .unwrap();
        assert!(status.success());
        assert_eq!((fs::read(&path).unwrap(), names(dir.path()).len()), (b"the last good one".to_vec(), 1));
    }
}
