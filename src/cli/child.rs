//! This command once more, in a process of its own that does one part of the work: its memory is its own, and whatever ends it ends
//! nothing else. The part's outcome is one line of JSON, an error being one too.

use super::stdout::Stdout;
use crate::error::{Context, Error, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::process::{Command, Output, Stdio};

/// An error on its way to the process that asked.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    cause: String,
    hint: Option<String>,
}

/// Does a part of the work and writes what came of it.
pub fn answer<T: Serialize>(work: impl FnOnce() -> Result<T>) -> Result<()> {
    let outcome = work().map_err(|e| Told { cause: e.to_string(), hint: e.hint_text().map(str::to_string) });
    Ok(writeln!(Stdout::lock(), "{}", serde_json::to_string(&outcome)?)?)
}

/// Runs this command with `--part PART` behind its arguments; what [`answer`] wrote there.
pub fn ask<T: DeserializeOwned>(part: &str) -> Result<T> {
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let mut command = Command::new(program);
    command.args(std::env::args_os().skip(1)).args(["--part", part]).stderr(Stdio::inherit());
    read(&command.output().context("cannot start a process")?)
}

fn read<T: DeserializeOwned>(said: &Output) -> Result<T> {
    if !said.status.success() {
        let status = said.status.to_string();
        let why = if status.contains("SIGKILL") { ", as the system ends one when memory runs out" } else { "" };
        return Err(Error::new(format!("its process ended with {status}{why}"))
            .hint("what it had to say stands above; on a small machine take a smaller --preset, --micro or --seq"));
    }
    let outcome: Result<T, Told> = serde_json::from_slice(&said.stdout).context("what its process wrote")?;
    outcome.map_err(|told| {
        let e = Error::new(told.cause);
        match told.hint {
            Some(hint) => e.hint(hint),
            None => e,
        }
    })
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn run(script: &str) -> Result<u32> {
        read(&Command::new("sh").args(["-c", script]).output().unwrap())
    }

    #[test]
    fn an_outcome_comes_over_and_an_end_is_told() {
        assert_eq!(run("echo '{\"Ok\":7}'").unwrap(), 7);
        let e = run("echo '{\"Err\":{\"cause\":\"c\",\"hint\":\"h\"}}'").unwrap_err();
        assert_eq!((e.cause(), e.hint_text()), ("c", Some("h")));
        let e = run("kill -9 $$").unwrap_err();
        assert!(e.cause().contains("signal: 9") && e.cause().contains("memory runs out"), "{e}");
        assert!(run("echo 7; exit 3").unwrap_err().cause().contains("exit status: 3"));
        assert!(run("true").unwrap_err().cause().contains("what its process wrote"));
    }
}
