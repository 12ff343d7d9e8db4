//! The one error type of the rooms: a cause and a hint, and the chain of what led to it.
//!
//! Shown to a user as the cause, a blank line, and `hint: …` (see [`Error::report`]).

pub mod near;
pub mod words;

use std::fmt;

/// Result of everything below `cli`.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong (`cause`), and what to do about it (`hint`).
#[derive(Debug)]
pub struct Error {
    cause: String,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    diverged: bool,
}

impl Error {
    /// An error that names the thing that is wrong.
    pub fn new(cause: impl Into<String>) -> Self {
        Self { cause: cause.into(), hint: None, source: None, diverged: false }
    }

    /// Adds what the user can do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds what the user can do, unless that has been said.
    pub fn or_hint(self, hint: impl Into<String>) -> Self {
        if self.hint.is_some() { self } else { self.hint(hint) }
    }

    /// Adds the underlying error.
    pub fn source(mut self, e: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(e.into());
        self
    }

    /// Marks that numbers of a training are no longer numbers: what its weights have become is not worth to be kept.
    pub fn diverged(mut self) -> Self {
        self.diverged = true;
        self
    }

    /// Takes [`Error::diverged`] back: the cause was found elsewhere.
    pub fn not_diverged(mut self) -> Self {
        self.diverged = false;
        self
    }

    /// See [`Error::diverged`].
    pub fn has_diverged(&self) -> bool {
        self.diverged
    }

    /// Puts `what` in front of the cause: `what: cause`. The hint stays.
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.cause = format!("{what}: {}", self.cause);
        self
    }

    /// Changes the words of cause and hint.
    pub fn reworded(mut self, change: impl Fn(&str) -> String) -> Self {
        self.cause = change(&self.cause);
        self.hint = self.hint.as_deref().map(change);
        self
    }

    /// The cause alone, on one line.
    pub fn cause(&self) -> &str {
        &self.cause
    }

    /// The hint, if there is one.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// What a user reads: cause with its sources, a blank line, the hint.
    pub fn report(&self) -> String {
        let mut s = self.to_string();
        if let Some(h) = &self.hint {
            s.push_str("\n\nhint: ");
            s.push_str(h);
        }
        s
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cause)?;
        if let Some(e) = &self.source {
            write!(f, ": {e}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        // A backtrace is for the log, not for the one-line cause.
        match e {
            candle_core::Error::WithBacktrace { inner, .. } => Self::from(*inner),
            e => Self::new(e.to_string()),
        }
    }
}

/// Adds context to a `Result` of any error type, turning it into ours.
pub trait Context<T> {
    /// Puts `what` in front of the error.
    fn context(self, what: impl fmt::Display) -> Result<T>;
    /// As [`Context::context`], computed only on failure.
    fn with_context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|e| e.into().context(what))
    }
    fn with_context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|e| e.into().context(what()))
    }
}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        let error = Self::new(e.to_string());
        match io_hint(e.kind()) {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

/// What to do about a failed read or write, where nobody knows better.
fn io_hint(kind: std::io::ErrorKind) -> Option<&'static str> {
    use std::io::ErrorKind::*;
    Some(match kind {
        NotFound => "see that the file is there and its path right",
        PermissionDenied => "this user may not read or write there: change the rights, or use another path",
        StorageFull | QuotaExceeded => "the disk or the quota is full: free some space, or use another disk",
        FileTooLarge => {
            "the file would be over the limit of its size (`ulimit -f`, the file system): raise it, or use another disk"
        }
        ReadOnlyFilesystem => "nothing can be written there: use another path",
        InvalidData => "the file is damaged, or not of the kind that it should be: copy or download it again",
        UnexpectedEof => "the file is cut off: copy or download it again",
        IsADirectory => "a folder stands where a file should: give the file's path",
        NotADirectory => "a file stands where a folder should: give the folder's path",
        StaleNetworkFileHandle | TimedOut => "the file system does not answer as it should: try again",
        _ => return None,
    })
}

impl From<serde_json::Error> for Error {
    fn from(e: serde_json::Error) -> Self {
        Self::new(words::plain(&e.to_string()))
            .hint("mend the file there, or, if it was not written by hand, copy or download it again")
    }
}

impl From<safetensors::SafeTensorError> for Error {
    fn from(e: safetensors::SafeTensorError) -> Self {
        Self::new(e.to_string()).hint("the file is damaged or incomplete: copy or download it again")
    }
}

/// `bail!("cause {x}")` or `bail!("cause {x}"; "hint {y}")`.
#[macro_export]
macro_rules! bail {
    ($fmt:literal $(, $a:expr)* ; $hint:literal $(, $b:expr)* $(,)?) => {
        return Err($crate::error::Error::new(format!($fmt $(, $a)*)).hint(format!($hint $(, $b)*)))
    };
    ($fmt:literal $(, $a:expr)* $(,)?) => {
        return Err($crate::error::Error::new(format!($fmt $(, $a)*)))
    };
}
