//! The crate's error type: a kind, a message for the user, and details for the log.
//!
//! It does not depend on HTTP: `server::error_response` turns it into a status and a body.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The kind of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A request, a file or a setting is malformed or out of range.
    Invalid,
    /// The key is missing or wrong.
    Unauthorized,
    /// The key or the address has no permission.
    Forbidden,
    /// There is no such model, adapter, file, job or route.
    NotFound,
    /// The route exists, but not for this method.
    MethodNotAllowed,
    /// The present state does not allow it.
    Conflict,
    /// A body or a file is over a limit.
    TooLarge,
    /// The headers of a request are over a limit.
    HeadersTooLarge,
    /// A queue is full; a later try may succeed.
    Overloaded,
    /// A part of the program is not running yet, or no longer, or has no room at present.
    Unavailable,
    /// A fault of this program or its machine. Its details are for the log only.
    Internal,
}

impl ErrorKind {
    /// The `kind` label of metrics.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::Conflict => "conflict",
            Self::TooLarge => "too_large",
            Self::HeadersTooLarge => "headers_too_large",
            Self::Overloaded => "overloaded",
            Self::Unavailable => "unavailable",
            Self::Internal => "internal",
        }
    }
}

/// An error. `{}` writes the message alone; `{:#}` adds the path and all sources, for logs.
#[derive(Debug, Clone)]
pub struct Error {
    /// Its kind.
    pub kind: ErrorKind,
    /// For a person: what was wrong and what is allowed.
    pub message: String,
    /// The field of the request at fault, where there is one.
    pub param: Option<String>,
    /// A stable word for programs, such as `adapter_not_found`.
    pub code: Option<&'static str>,
    /// The file or directory that the error concerns, where there is one.
    pub path: Option<PathBuf>,
    /// The error that caused this one.
    pub source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` with a message and nothing else.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), param: None, code: None, path: None, source: None }
    }

    /// A bad value. Name its field with [`Error::param`] where there is one.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// Something that does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    /// A fault of this program or its machine.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// Names the field of the request at fault.
    pub fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Adds the stable code.
    pub fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// Names the file or directory concerned, without changing the message.
    pub(crate) fn path(mut self, path: impl Into<PathBuf>) -> Self {
        self.path = Some(path.into());
        self
    }

    /// Names the file or directory concerned, also at the start of the message.
    pub(crate) fn in_file(mut self, path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        self.message = format!("{}: {}", path.display(), self.message);
        self.path(path)
    }

    /// Puts `name` in the place of a path in the message, which then is for clients that must not learn the path. The path is kept
    /// for the log.
    pub(crate) fn hide_path(mut self, path: &Path, name: &str) -> Self {
        self.message = self.message.replace(&path.display().to_string(), name);
        self.path(path)
    }

    /// Keeps the error that caused this one.
    pub(crate) fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(Arc::from(source.into()));
        self
    }

    /// The message as a client may see it. An internal error tells it only where the log has the details: `reference` is
    /// what the log line carries too, such as `request id 7`.
    pub(crate) fn public_message(&self, reference: &str) -> Cow<'_, str> {
        match self.kind {
            ErrorKind::Internal => format!("internal error; the server's log has the details under {reference}").into(),
            _ => self.message.as_str().into(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !f.alternate() {
            return f.write_str(&self.message);
        }
        let mut text = self.message.clone();
        // A message may quote its path or its source already.
        let add = |text: &mut String, part: String| {
            if !text.contains(&part) {
                *text = format!("{text}: {part}");
            }
        };
        self.path.iter().for_each(|path| add(&mut text, path.display().to_string()));
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            add(&mut text, error.to_string());
            source = error.source();
        }
        f.write_str(&text)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        Self::internal(e.to_string()).caused_by(e)
    }
}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        Self::internal(e.to_string()).caused_by(e)
    }
}

/// Adds the path to the error of a file operation.
pub(crate) trait AtPath<T> {
    /// The value, or an internal error that concerns `path`.
    fn at(self, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T> AtPath<T> for std::io::Result<T> {
    fn at(self, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|e| Error::from(e).path(path))
    }
}

/// Runs work that blocks or takes long on a thread for such work. Errors: those of the work, and `Internal` if it panics.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::internal(e.to_string()).caused_by(e))?
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn the_log_form_has_the_path_and_each_source_once() {
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let error = Error::from(full()).path("/state/a.json");
        assert_eq!(error.to_string(), full().to_string());
        assert_eq!(format!("{error:#}"), format!("{}: /state/a.json", full()));

        let outer = Error::internal("the state cannot be kept").caused_by(error.clone());
        assert_eq!(format!("{outer:#}"), format!("the state cannot be kept: {}", full()));
        let outer = Error::internal("broken").in_file("/b").caused_by(io::Error::other(error));
        assert_eq!(format!("{outer:#}"), format!("/b: broken: {}", full()));
        let source = outer.source.as_deref().and_then(|e| e.downcast_ref::<io::Error>());
        assert!(source.is_some(), "the source keeps its type");
    }

    #[test]
    fn a_hidden_path_is_only_in_the_log_form() {
        let error = Error::invalid("broken").in_file("/secret/a").hide_path(Path::new("/secret/a"), "the file");
        assert_eq!(error.to_string(), "the file: broken");
        assert_eq!(format!("{error:#}"), "the file: broken: /secret/a");
    }

    #[test]
    fn only_internal_errors_are_hidden() {
        let shown = |error: Error| error.public_message("request id 7").into_owned();
        assert_eq!(shown(Error::invalid("`n` must be 1")), "`n` must be 1");
        let hidden = shown(Error::internal("/secret"));
        assert_eq!(hidden, "internal error; the server's log has the details under request id 7");
    }
}
