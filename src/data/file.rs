//! What a path leads to, and which format its first bytes are: told before a byte of it is taken for ours.

use crate::bail;
use crate::error::{Error, Result, near};
use std::fs::{File, Metadata};
use std::io::{BufReader, ErrorKind, Read};
use std::path::Path;

/// First bytes that are enough to tell every format that [`format`] knows (tar's mark ends at 262).
pub(super) const HEAD: usize = 4096;

/// Opens a file for reading. `what` it is, "the data file" or "the image", and what `hint` to give if it is not there.
///
/// # Errors
/// If there is none, or it is a folder, a pipe, a device or a socket, which never end or are never answered; the error names it.
pub(super) fn open(path: &Path, what: &str, hint: &str) -> Result<(File, Metadata)> {
    let cannot = |e: std::io::Error| {
        let hint = if e.kind() == ErrorKind::NotFound { near::path_hint(path, hint) } else { hint.to_string() };
        Error::new(format!("cannot read {what} {}: {e}", shown(path))).hint(hint)
    };
    let metadata = std::fs::metadata(path).map_err(cannot)?;
    if let Some(kind) = no_file(&metadata) {
        let hint = if metadata.is_dir() { hint } else { "copy what is in it to a file on disk, and name that" };
        bail!("cannot read {what} {}: it is {kind}, not a file", shown(path); "{hint}")
    }
    Ok((File::open(path).map_err(cannot)?, metadata))
}

/// Largest file of settings or of a vocabulary that is read, in bytes; those of the largest models have about 40 MB.
const MAX_SETTINGS: u64 = 256 << 20;

/// The bytes of a file of a model's folder; `None` if there is none of this name.
///
/// # Errors
/// If it cannot be read, is too large, or leads to something else (a broken link, a pipe): to go on without it would be another
/// model's way, in silence.
pub(super) fn optional(path: &Path) -> Result<Option<Vec<u8>>> {
    const HINT: &str = "copy the file itself from where the model comes from, or take it away if the model has none";
    match std::fs::symlink_metadata(path) {
        Err(e) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&e.kind()) => return Ok(None),
        Ok(link) if link.is_symlink() && !path.exists() => {
            bail!("{} is a link that leads nowhere", shown(path); "{HINT}")
        }
        _ => {}
    }
    let (file, metadata) = open(path, "the file", HINT)?;
    if metadata.len() > MAX_SETTINGS {
        bail!("{} has {} MiB, more than the {} that such a file may have", shown(path), metadata.len() >> 20, MAX_SETTINGS >> 20; "{HINT}")
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    let read = file.take(MAX_SETTINGS).read_to_end(&mut bytes);
    read.map_err(|e| Error::new(format!("cannot read the file {}: {e}", shown(path))).hint(HINT))?;
    Ok(Some(bytes))
}

/// What a path leads to that is no file.
pub(super) fn no_file(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return Some("a pipe");
        }
        if kind.is_socket() {
            return Some("a socket");
        }
        if kind.is_block_device() || kind.is_char_device() {
            return Some("a device");
        }
    }
    match (kind.is_file(), kind.is_dir()) {
        (true, _) => None,
        (_, true) => Some("a folder"),
        _ => Some("something else"),
    }
}

/// A path for an error: a name of kilobytes (a picture that stands in the data as base64) is cut short, and what would move a
/// terminal's cursor is left out.
pub(super) fn shown(path: &Path) -> String {
    let name = path.display().to_string();
    short(&name.replace(char::is_control, "\u{fffd}"), 300)
}

/// At most `limit` characters of a text, with … for the rest.
pub(super) fn short(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        None => text.to_string(),
        Some((at, _)) => format!("{}…", &text[..at]),
    }
}

/// The first [`HEAD`] bytes of what is left of a file, or all of it.
pub(super) fn head(file: &mut BufReader<File>) -> std::io::Result<Vec<u8>> {
    let mut head = vec![];
    file.by_ref().take(HEAD as u64).read_to_end(&mut head)?;
    Ok(head)
}

/// The format that a file's first bytes are the mark of, in words; `None` if they may be text, PNG or JPEG.
pub(super) fn format(head: &[u8]) -> Option<&'static str> {
    let marks: [(&[u8], &str); 31] = [
        (b"\x1f\x8b", "gzip-compressed"),
        (b"\x28\xb5\x2f\xfd", "Zstandard-compressed"),
        (b"\xfd7zXZ\0", "xz-compressed"),
        (b"BZh", "bzip2-compressed"),
        (b"\x04\x22\x4d\x18", "LZ4-compressed"),
        (b"PK\x03\x04", "a zip archive"),
        (b"PK\x05\x06", "an empty zip archive"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!", "a RAR archive"),
        (b"PAR1", "a Parquet table"),
        (b"ARROW1", "an Arrow table"),
        (b"\xff\xff\xff\xff", "an Arrow stream"),
        (b"Obj\x01", "an Avro table"),
        (b"ORC", "an ORC table"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"\x89HDF", "an HDF5 file"),
        (b"\x93NUMPY", "a NumPy array"),
        (b"%PDF", "a PDF"),
        (b"GIF8", "a GIF picture"),
        (b"BM", "a BMP picture"),
        (b"II*\0", "a TIFF picture"),
        (b"MM\0*", "a TIFF picture"),
        (b"II+\0", "a TIFF picture"),
        (b"MM\0+", "a TIFF picture"),
        (b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
        (b"\xff\x0a", "a JPEG XL picture"),
        (b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
        (b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
        (b"8BPS", "a Photoshop picture"),
        (b"\0\0\x01\0", "an icon"),
        (b"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
    ];
    if head.starts_with(b"RIFF") && head.get(8..12) == Some(b"WEBP") {
        return Some("a WebP picture");
    }
    if head.get(4..8) == Some(b"ftyp") {
        return Some(match head.get(8..12) {
            Some(b"avif" | b"avis") => "an AVIF picture",
            Some(b"heic" | b"heix" | b"hevc" | b"hevx" | b"heim" | b"heis" | b"mif1" | b"msf1") => "a HEIC picture",
            _ => "a film (MP4)",
        });
    }
    if head.get(257..262) == Some(b"ustar") {
        return Some("a tar archive");
    }
    if matches!(head, [0x80, 2..=5, ..]) {
        return Some("a Python pickle");
    }
    // "BM" begins words too.
    let binary = |name: &str| !name.contains("BMP") || head.contains(&0);
    if let Some((_, name)) = marks.iter().find(|(mark, name)| head.starts_with(mark) && binary(name)) {
        return Some(name);
    }
    let text: Vec<u8> = head.trim_ascii_start().iter().take(15).map(u8::to_ascii_lowercase).collect();
    if text.starts_with(b"<!doctype html") || text.starts_with(b"<html") || text.starts_with(b"<head") {
        return Some("an HTML page");
    }
    if text.starts_with(b"<svg") {
        return Some("an SVG picture");
    }
    text.starts_with(b"<?xml").then_some("XML")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_our_pictures_are_no_other_format() {
        for ours in
            [b"[{}]" as &[u8], b"{\"id\": 1}", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BMW,a car", b"", b"a.png,x"]
        {
            assert_eq!(format(ours), None, "{ours:?}");
        }
        let mut tar = [0; 512];
        tar[257..262].copy_from_slice(b"ustar");
        for (head, name) in [
            (&tar[..], "a tar archive"),
            (b"RIFF\x10\0\0\0WEBPVP8 ", "a WebP picture"),
            (b"\0\0\0\x20ftypheic", "a HEIC picture"),
            (b"\0\0\0\x20ftypavif", "an AVIF picture"),
            (b"BM\x36\0\0\0", "a BMP picture"),
            (b"\n <!DOCTYPE HTML>", "an HTML page"),
            (b"PAR1", "a Parquet table"),
        ] {
            assert_eq!(format(head), Some(name));
        }
    }

    #[test]
    fn long_names_are_cut_between_characters() {
        assert_eq!(short("äöü", 2), "äö…");
        assert_eq!(short("äöü", 3), "äöü");
    }
}
