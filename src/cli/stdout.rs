//! Standard output and standard error, whose readers may go away.

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
