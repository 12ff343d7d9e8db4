//! Requests to the hub: where the token goes, how long to wait, what is tried again.
//!
//! Large files are kept on other hosts, and the hub redirects to them. Redirects are followed here, one by one, because
//! the token belongs to the hub alone: it stays within one origin (scheme, host and port) and does not come back once an
//! address elsewhere had a say.

use super::settings::Hub;
use crate::error::Error;
use std::io;
use std::time::Duration;
use ureq::http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, ETAG, LOCATION, RANGE, RETRY_AFTER,
};
use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body, Timeout};

/// How often in a row something is tried again.
pub(super) const RETRIES: u32 = 5;
const REDIRECTS: usize = 10;
/// Of the file that a large file's redirect leads to.
const LINKED_ETAG: &str = "x-linked-etag";
/// A list of files is far below.
const LIST_BYTES: u64 = 64 << 20;

/// Why a request brought nothing.
#[derive(Debug)]
pub(super) struct Failure {
    cause: String,
    status: Option<u16>,
    remedy: Remedy,
    /// The host that was asked in the end, without the token, where a token is set.
    without_token: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Remedy {
    /// It would fail again.
    None,
    /// There may be no network at all.
    Network,
    /// Trying again, after a pause that the server may have named.
    Again(Option<Duration>),
}

impl Failure {
    pub(super) fn passing(cause: impl Into<String>) -> Self {
        Self { cause: cause.into(), status: None, remedy: Remedy::Again(None), without_token: None }
    }

    pub(super) fn last(cause: impl Into<String>) -> Self {
        Self { remedy: Remedy::None, ..Self::passing(cause) }
    }

    /// `wait` is the time-out in force, as the variable that sets it says it.
    fn transport(e: ureq::Error, wait: Wait) -> Self {
        let (seconds, name) = (wait.time.as_secs_f64(), wait.name);
        let nothing = format!("nothing came for {seconds} s ({name})");
        match e {
            ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => {
                Self { remedy: Remedy::Network, ..Self::last(format!("no connection within {seconds} s ({name})")) }
            }
            ureq::Error::Timeout(_) => Self::passing(nothing),
            ureq::Error::HostNotFound | ureq::Error::ConnectionFailed => {
                Self { remedy: Remedy::Network, ..Self::last(e.to_string()) }
            }
            ureq::Error::Io(e) => match e.kind() {
                io::ErrorKind::ConnectionRefused => Self { remedy: Remedy::Network, ..Self::last(e.to_string()) },
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Self::passing(nothing),
                // A certificate.
                io::ErrorKind::InvalidData => Self::last(e.to_string()),
                _ => Self::passing(format!("the connection broke: {e}")),
            },
            ureq::Error::Protocol(_) => Self::passing(e.to_string()),
            e => Self::last(e.to_string()),
        }
    }

    fn status(response: &Response<Body>) -> Self {
        let status = response.status().as_u16();
        let said = header(response.headers(), "x-error-message").unwrap_or_default();
        let said: String = said.chars().take(300).collect();
        let cause =
            if said.is_empty() { format!("http status: {status}") } else { format!("http status: {status} ({said})") };
        let after = header(response.headers(), RETRY_AFTER.as_str()).and_then(|s| s.parse().ok());
        let again = [408, 429, 500, 502, 503, 504].contains(&status);
        let remedy = if again { Remedy::Again(after.map(Duration::from_secs)) } else { Remedy::None };
        Self { status: Some(status), remedy, ..Self::last(cause) }
    }

    /// The range that was asked for does not exist.
    pub(super) fn is_beyond_the_end(&self) -> bool {
        self.status == Some(416)
    }

    /// What a user reads, about `what`.
    pub(super) fn error(self, what: &str, hub: &Hub) -> Error {
        let endpoint = shown(&hub.endpoint);
        let error = Error::new(format!("cannot get {what} from {endpoint}: {}", self.cause));
        let token = match self.without_token {
            Some(host) => {
                format!("the request was passed on to {host}, to which the token of {endpoint} is never sent")
            }
            None if hub.token.is_some() => "the token in use may not read it".into(),
            None => "set HF_TOKEN if it is private or gated".into(),
        };
        error.hint(match (self.status, self.remedy) {
            (Some(401 | 403), _) => format!("is the name right? {token}; gated models also need their licence accepted"),
            (Some(404), _) => format!("no such repository, revision or file; {token}"),
            (Some(429), _) => "too many requests were made; wait some minutes, and set HF_TOKEN, which allows more".into(),
            (_, Remedy::Again(_)) => {
                "the network or the hub is disturbed; the same command goes on with what has arrived (a slow \
                 connection: HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT are in seconds; HF_ENDPOINT names a mirror)"
                    .into()
            }
            _ => "is there a network (HF_ENDPOINT names a mirror)? A local folder works as `source` as well".into(),
        })
    }
}

/// For how long an answer may stay out, and the variable that says so.
#[derive(Clone, Copy)]
struct Wait {
    time: Duration,
    name: &'static str,
}

/// What the hub says about a file.
#[derive(Debug, PartialEq)]
pub(super) struct Metadata {
    /// The SHA-256 in hex for large files.
    pub etag: String,
    /// In bytes.
    pub size: Option<u64>,
}

/// Asks one hub.
pub(super) struct Client<'a> {
    hub: &'a Hub,
    agent: Agent,
}

impl<'a> Client<'a> {
    pub(super) fn new(hub: &'a Hub) -> Self {
        let config = Agent::config_builder()
            .max_redirects(0)
            .http_status_as_error(false)
            .user_agent(concat!("adfreeze/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { hub, agent: config.into() }
    }

    /// The address of a file of `repo`.
    pub(super) fn file(&self, repo: &str, commit: &str, name: &str) -> String {
        let name: Vec<_> = name.split('/').map(quoted).collect();
        format!("{}/{repo}/resolve/{commit}/{}", self.hub.endpoint, name.join("/"))
    }

    /// The hub's description of a revision, as JSON.
    pub(super) fn revision(&self, repo: &str, revision: &str) -> Result<String, Failure> {
        let url = format!("{}/api/models/{repo}/revision/{}", self.hub.endpoint, quoted(revision));
        let wait = self.questions();
        self.again(&url, || {
            let response = self.ask(Method::Get, &url, 0, wait)?;
            let mut body = response.into_body();
            let text = body.with_config().limit(LIST_BYTES).read_to_string();
            text.map_err(|e| Failure::transport(e, wait))
        })
    }

    /// What the hub says about the file at `url`.
    pub(super) fn metadata(&self, url: &str) -> Result<Metadata, Failure> {
        self.again(url, || {
            let response = self.ask(Method::Head, url, 0, self.questions())?;
            let headers = response.headers();
            let etag = tag(headers)
                .ok_or_else(|| Failure::last(format!("{} tells no ETag; that is not a hub", shown(url))))?;
            let linked = header(headers, "x-linked-size");
            let own = || header(headers, CONTENT_LENGTH.as_str()).filter(|_| !response.status().is_redirection());
            Ok(Metadata { etag, size: linked.or_else(own).and_then(|s| s.parse().ok()) })
        })
    }

    /// The file at `url` from byte `from` on.
    pub(super) fn download(&self, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        let response = self.ask(Method::Get, url, from, self.downloads())?;
        match header(response.headers(), CONTENT_ENCODING.as_str()) {
            Some(coding) if coding != "identity" => Err(Failure::last(format!("it was sent in {coding}, unasked"))),
            _ => Ok(response),
        }
    }

    /// What went wrong while the body of a [`Client::download`] was read.
    pub(super) fn broken(&self, e: io::Error) -> Failure {
        Failure::transport(e.into(), self.downloads())
    }

    /// Waits before attempt `n` (from 1) of something at `url` that failed; an error if that makes no sense.
    pub(super) fn pause(&self, url: &str, n: u32, failure: Failure) -> Result<(), Failure> {
        let longer = self.hub.pause * (1 << (n - 1).min(3));
        let pause = match failure.remedy {
            Remedy::None => return Err(failure),
            _ if n > RETRIES => return Err(failure),
            Remedy::Network | Remedy::Again(None) => longer,
            Remedy::Again(Some(named)) if named <= Duration::from_secs(300) => named.max(longer),
            Remedy::Again(Some(_)) => return Err(failure),
        };
        let (url, cause, seconds) = (shown(url), failure.cause, pause.as_secs_f64());
        tracing::warn!("{url}: {cause}; trying again in {seconds} s ({n} of {RETRIES})");
        std::thread::sleep(pause);
        Ok(())
    }

    /// Asks until there is an answer, within bounds; where nothing is reached at all, once.
    fn again<T>(&self, url: &str, ask: impl Fn() -> Result<T, Failure>) -> Result<T, Failure> {
        let mut n = 1;
        loop {
            match ask() {
                Err(failure) if matches!(failure.remedy, Remedy::Again(_)) => self.pause(url, n, failure)?,
                result => return result,
            }
            n += 1;
        }
    }

    fn questions(&self) -> Wait {
        Wait { time: self.hub.etag_timeout, name: "HF_HUB_ETAG_TIMEOUT" }
    }

    fn downloads(&self) -> Wait {
        Wait { time: self.hub.download_timeout, name: "HF_HUB_DOWNLOAD_TIMEOUT" }
    }

    /// Sends a request and follows its redirects. A question about a file (HEAD) ends where the hub answers it, which is
    /// in the redirect to where a large file lies.
    fn ask(&self, method: Method, url: &str, from: u64, wait: Wait) -> Result<Response<Body>, Failure> {
        let mut uri: Uri = url.parse().map_err(|e| Failure::last(format!("{}: {e}", shown(url))))?;
        let mut token = self.hub.token.as_deref();
        for _ in 0..=REDIRECTS {
            let response = self.send(method, &uri, token, from, wait)?;
            let status = response.status();
            let location = header(response.headers(), LOCATION.as_str()).filter(|_| status.is_redirection());
            let Some(location) = location else {
                return if status.is_success() {
                    Ok(response)
                } else {
                    let kept = self.hub.token.is_some() && token.is_none();
                    let without_token = kept.then(|| uri.authority().map(|a| shown(a.as_str()))).flatten();
                    Err(Failure { without_token, ..Failure::status(&response) })
                };
            };
            let next = join(&uri, &location).ok_or_else(|| {
                Failure::last(format!("{} redirects to `{}`, which is no address", shown(url), shown(&location)))
            })?;
            let leaves = origin(&next) != origin(&uri);
            let answered =
                || tag(response.headers()).is_some() && (leaves || response.headers().contains_key(LINKED_ETAG));
            if method == Method::Head && answered() {
                return Ok(response);
            }
            token = token.filter(|_| !leaves);
            uri = next;
        }
        Err(Failure::last(format!("more than {REDIRECTS} redirects from {}", shown(url))))
    }

    fn send(
        &self,
        method: Method,
        uri: &Uri,
        token: Option<&str>,
        from: u64,
        wait: Wait,
    ) -> Result<Response<Body>, Failure> {
        let mut request = if method == Method::Head { self.agent.head(uri) } else { self.agent.get(uri) };
        // Lengths and ranges are those of the file itself.
        request = request.header(ACCEPT_ENCODING, "identity");
        if from > 0 {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let time = Some(wait.time);
        let request = request.config().timeout_resolve(time).timeout_connect(time).timeout_send_request(time);
        let request = request.timeout_recv_response(time).timeout_per_read(time).build();
        request.call().map_err(|e| Failure::transport(e, wait))
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Method {
    Get,
    Head,
}

pub(super) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.trim().to_string())
}

/// The name under which the cache keeps a file: its ETag, for large files that of what the hub links to.
fn tag(headers: &HeaderMap) -> Option<String> {
    let tag = header(headers, LINKED_ETAG).or_else(|| header(headers, ETAG.as_str()))?;
    let tag = tag.trim_start_matches("W/").trim_matches('"');
    // It becomes the name of a file.
    let fits = tag.len() <= 200
        && !tag.starts_with('.')
        && tag.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    (fits && !tag.is_empty()).then(|| tag.to_string())
}

/// Scheme, host and port.
fn origin(uri: &Uri) -> (Option<String>, Option<String>, Option<u16>) {
    let scheme = uri.scheme_str().map(str::to_lowercase);
    let usual = match scheme.as_deref() {
        Some("http") => Some(80),
        Some("https") => Some(443),
        _ => None,
    };
    (scheme, uri.host().map(str::to_lowercase), uri.port_u16().or(usual))
}

/// The address that `location` means in an answer from `base` (RFC 3986, without its dots in paths).
fn join(base: &Uri, location: &str) -> Option<Uri> {
    let location = location.split('#').next()?;
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let head = &location[..location.find(['/', '?']).unwrap_or(location.len())];
    let absolute = if head.contains(':') {
        location.to_string()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", base.path())
    } else {
        let folder = &base.path()[..=base.path().rfind('/')?];
        format!("{scheme}://{authority}{folder}{location}")
    };
    let uri: Uri = absolute.parse().ok()?;
    (matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|h| !h.is_empty())).then_some(uri)
}

/// Percent-encodes all that has a meaning in an address.
fn quoted(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.~".contains(&b);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// An address for a message: without a name and a password in it, and without the query, which may be a signature.
pub(super) fn shown(url: &str) -> String {
    let url = url.split('?').next().unwrap_or(url);
    let (scheme, rest) = url.split_once("://").map_or(("", url), |(_, rest)| (&url[..url.len() - rest.len()], rest));
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    format!("{scheme}{}{path}", authority.rsplit('@').next().unwrap_or(authority))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_redirect_leads() {
        let base: Uri = "https://hub.co/owner/m/resolve/main/a.json?x=1".parse().unwrap();
        let to = |location: &str| join(&base, location).map(|u| u.to_string());
        let same = |location: &str, url: &str| assert_eq!(to(location).as_deref(), Some(url), "{location}");
        same("/api/x?u=http://a/b", "https://hub.co/api/x?u=http://a/b");
        same("b.json", "https://hub.co/owner/m/resolve/main/b.json");
        same("?y=2", "https://hub.co/owner/m/resolve/main/a.json?y=2");
        same("//cdn.co/x", "https://cdn.co/x");
        same("http://hub.co/x#part", "http://hub.co/x");
        for bad in ["ftp://hub.co/x", "file:///etc/passwd", "https://", "javascript:1", "http://a b/"] {
            assert_eq!(to(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let origin = |url: &str| origin(&url.parse().unwrap());
        let hub = origin("https://hub.co/a");
        for same in ["https://hub.co", "https://HUB.co:443/b?c", "https://me:pw@hub.co/"] {
            assert_eq!(origin(same), hub, "{same}");
        }
        for other in [
            "http://hub.co/a",
            "https://hub.co:8443/a",
            "https://cdn.hub.co/a",
            "https://hub.co.evil/a",
            "https://hub.co@evil/",
        ] {
            assert_ne!(origin(other), hub, "{other}");
        }
        assert_eq!(origin("http://h:80/"), origin("http://h/"));
    }

    #[test]
    fn messages_hold_no_credential() {
        assert_eq!(shown("https://me:pw@hub.co/a/b?Signature=abc"), "https://hub.co/a/b");
        assert_eq!(shown("hub.co:80"), "hub.co:80");
        assert_eq!(quoted("refs/pr/1 ü"), "refs%2Fpr%2F1%20%C3%BC");
    }

    #[test]
    fn a_tag_is_never_a_path() {
        let tag = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(ETAG, value.parse().unwrap());
            tag(&headers)
        };
        assert_eq!(tag("W/\"abc-1\"").as_deref(), Some("abc-1"));
        for bad in ["\"\"", "\"../../x\"", "\"a/b\"", "\".\""] {
            assert_eq!(tag(bad), None, "{bad}");
        }
    }
}
