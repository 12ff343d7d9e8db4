//! Standard output and standard error, whose readers may go away, and how wide a terminal is.

use crate::report::width;
use std::io::{Error, ErrorKind, Result, StdoutLock, Write};

/// Standard output. Where its reader has gone (`adfreeze check … | head`), the rest is dropped without an error: what
/// was asked for is still done, and the exit code tells how it went.
pub struct Stdout {
    inner: StdoutLock<'static>,
    gone: bool,
}

impl Stdout {
    /// Locks it.
    pub fn lock() -> Self {
        Self { inner: std::io::stdout().lock(), gone: false }
    }

    fn settle<T>(&mut self, result: Result<T>, dropped: T) -> Result<T> {
        match result {
            Err(e) if e.kind() == ErrorKind::BrokenPipe => {
                self.gone = true;
                Ok(dropped)
            }
            // An interrupted write is tried again by the caller, who knows it by its kind.
            Err(e) => Err(Error::new(e.kind(), format!("cannot write to standard output: {e}"))),
            ok => ok,
        }
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        if self.gone {
            return Ok(bytes.len());
        }
        let result = self.inner.write(bytes);
        self.settle(result, bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        if self.gone {
            return Ok(());
        }
        let result = self.inner.flush();
        self.settle(result, ())
    }
}

/// Standard error for lines of a log: what cannot be written there is dropped, for there is nowhere else to tell it.
#[derive(Default)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let _ = std::io::stderr().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A writer of text whose long lines are broken at spaces, as the terminal is wide.
pub struct Folded<W: Write> {
    to: W,
    columns: Option<usize>,
    /// A line whose end has not come yet.
    line: Vec<u8>,
}

impl<W: Write> Folded<W> {
    /// Onto `to`, within stdout's terminal, or what `COLUMNS` says where it is none.
    pub fn new(to: W) -> Self {
        Self { to, columns: width::of_stdout().or_else(width::of_environment), line: Vec::new() }
    }
}

impl<W: Write> Write for Folded<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let Some(columns) = self.columns else { return self.to.write(bytes) };
        self.line.extend_from_slice(bytes);
        if let Some(end) = self.line.iter().rposition(|b| *b == b'\n') {
            let rest = self.line.split_off(end + 1);
            let text = String::from_utf8_lossy(&self.line).into_owned();
            self.line = rest;
            self.to.write_all(width::wrap(&text, columns).as_bytes())?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        let rest = std::mem::take(&mut self.line);
        self.to.write_all(&rest)?;
        self.to.flush()
    }
}

impl<W: Write> Drop for Folded<W> {
    fn drop(&mut self) {
        // Whoever must know flushes.
        let _ = self.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_folded_as_they_end() {
        let mut out = Vec::new();
        {
            let mut folded = Folded { to: &mut out, columns: Some(12), line: Vec::new() };
            folded.write_all(b"one two thr").unwrap();
            folded.write_all(b"ee four\nno end yet, here").unwrap();
        }
        assert_eq!(String::from_utf8(out).unwrap(), "one two\nthree four\nno end yet, here");
    }
}
