//! What a daemon logs: sentences for people, with their facts as fields for searches. They go to
//! systemd's journal when that reads standard error, else to standard error.
//!
//! 1. A field `action` of an event, or of a span around it, is the journal's field BB_ACTION: so
//!    `journalctl BB_ACTION=…` shows what all daemons said of an action. tracing-journald sends them.
//! 2. The sentence has the fields as well, since `journalctl -u` shows nothing else, and
//!    tracing-journald's would be the message alone: `Sentences` makes it the message before it hands
//!    an event on.
//! 3. Values may come from hostile actions and clients: they are cut at `LONGEST_VALUE`, and in the
//!    sentence sooner; control characters are escaped there, so that one entry is one line.

#![expect(
    unsafe_code,
    reason = "it limits the time that a library's socket blocks"
)]

use std::{
    collections::BTreeSet,
    fmt::{self, Write},
    fs, io,
    os::fd::{BorrowedFd, RawFd},
    time::{Duration, Instant, SystemTime},
};

use nix::sys::{
    socket::{setsockopt, sockopt::SendTimeout},
    time::{TimeVal, TimeValLike},
};
use parking_lot::Mutex;
use tracing::{
    Event, Level, Span, Subscriber,
    field::{Field, Value, Visit},
    span,
};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::{
    Layer, Registry,
    filter::{LevelFilter, Targets},
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt,
};
use uuid::Uuid;

use crate::config;

/// Bytes of one value.
const LONGEST_VALUE: usize = 8 << 10;

/// Bytes of one value in the sentence; the field has the rest.
const LONGEST_SHOWN: usize = 1 << 10;

/// Starts logging for the whole process, which has one thread as yet.
pub(super) fn start(program: &'static str, level: config::Level) -> LevelHandle {
    let (filter, handle) = reload::Layer::new(targets(level));
    let journal = reads_standard_error()
        .then(|| journal(program).ok())
        .flatten();
    // A second start, as in tests that run several daemons in one process, changes nothing.
    let _ = tracing_subscriber::registry()
        .with(Sentences { journal }.with_filter(filter))
        .try_init();
    LevelHandle(Some(handle))
}

/// Changes what is logged while the daemon runs.
#[derive(Default)]
pub(super) struct LevelHandle(Option<reload::Handle<Targets, Registry>>);

impl LevelHandle {
    pub(super) fn set(&self, level: config::Level) {
        if let Some(handle) = &self.0
            && let Err(error) = handle.reload(targets(level))
        {
            tracing::error!(%error, "could not change log.level");
        }
    }
}

/// Libraries talk about every frame; only our own words count.
fn targets(level: config::Level) -> Targets {
    let level = match level {
        config::Level::Error => LevelFilter::ERROR,
        config::Level::Warn => LevelFilter::WARN,
        config::Level::Info => LevelFilter::INFO,
        config::Level::Debug => LevelFilter::DEBUG,
        config::Level::Trace => LevelFilter::TRACE,
    };
    Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("bb_remote_execution", level)
}

/// The span of all that a daemon does for an action, so that each line has these fields. It is there
/// at every level. What is not known yet is recorded later, or left out.
pub fn action_span(action: &str, operation: Option<Uuid>, worker: Option<&str>) -> Span {
    let bounded = |text: &str| {
        let mut text = text.to_owned();
        cut(&mut text, LONGEST_VALUE);
        text
    };
    tracing::error_span!(
        "action",
        action = bounded(action),
        operation = operation.map(tracing::field::display),
        worker = worker.map(bounded),
    )
}

/// As tokio's, within the span of whoever calls.
pub fn spawn_blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> tokio::task::JoinHandle<T> {
    let span = Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work))
}

/// Whether standard error is read by the journal (systemd.exec(5), JOURNAL_STREAM).
fn reads_standard_error() -> bool {
    let ours = || {
        let stream = std::env::var("JOURNAL_STREAM").ok()?;
        let (device, inode) = stream.split_once(':')?;
        let stat = nix::sys::stat::fstat(io::stderr()).ok()?;
        Some(stat.st_dev.to_string() == device && stat.st_ino.to_string() == inode)
    };
    ours().unwrap_or(false)
}

/// Tells on standard error what somebody must act upon; the journal takes it for an error
/// (sd-daemon(3)).
pub(super) fn print_error(program: &str, text: &str) {
    let prefix = if reads_standard_error() { "<3>" } else { "" };
    for line in format!("{program}: {text}").lines() {
        eprintln!("{prefix}{line}");
    }
}

fn journal(program: &str) -> io::Result<tracing_journald::Layer> {
    let before = sockets()?;
    let layer = tracing_journald::Layer::new()?
        .with_field_prefix(Some("BB".to_owned()))
        .with_syslog_identifier(program.to_owned())
        .with_priority_mappings(PriorityMappings {
            info: Priority::Informational,
            debug: Priority::Debug,
            ..PriorityMappings::new()
        });
    // A journal that hangs must not make the daemon hang, and the layer's socket has no time limit.
    for descriptor in sockets()?.difference(&before) {
        // SAFETY: this process has one thread, which has opened nothing since `before` but the
        // layer's socket, and the layer lives on.
        let socket = unsafe { BorrowedFd::borrow_raw(*descriptor) };
        setsockopt(&socket, SendTimeout, &TimeVal::seconds(1))?;
    }
    Ok(layer)
}

/// The descriptors of this process that are sockets (proc_pid_fd(5)).
fn sockets() -> io::Result<BTreeSet<RawFd>> {
    let is_socket = |entry: &fs::DirEntry| {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        target
            .as_os_str()
            .as_encoded_bytes()
            .starts_with(b"socket:")
    };
    let entries = fs::read_dir("/proc/self/fd")?.flatten();
    let sockets = entries.filter(is_socket);
    Ok(sockets
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect())
}

/// Composes sentences, and hands them on to the journal or to standard error.
struct Sentences<L> {
    journal: Option<L>,
}

impl<S, L> Layer<S> for Sentences<L>
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    L: Layer<S>,
{
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, ctx: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = ctx.span(id) {
            span.extensions_mut().insert(fields);
        }
        if let Some(journal) = &self.journal {
            journal.on_new_span(attributes, id, ctx);
        }
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, ctx: Context<'_, S>) {
        if let Some(span) = ctx.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
        if let Some(journal) = &self.journal {
            journal.on_record(id, values, ctx);
        }
    }

    fn on_event(&self, event: &Event<'_>, ctx: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let sentence = {
            let spans: Vec<_> = ctx.event_scope(event).into_iter().flatten().collect();
            let spans: Vec<_> = spans.iter().map(|span| span.extensions()).collect();
            fields.sentence(spans.iter().filter_map(|span| span.get()))
        };
        let metadata = event.metadata();
        match &self.journal {
            Some(journal) if metadata.fields().field("message").is_some() => {
                let texts = metadata.fields().iter().map(|field| match field.name() {
                    "message" => Some(sentence.as_str()),
                    name => fields.get(name),
                });
                let texts: Vec<Option<&str>> = texts.collect();
                let values = texts
                    .iter()
                    .map(|text| text.as_ref().map(|text| text as &dyn Value));
                let values: Vec<Option<&dyn Value>> = values.collect();
                let values = metadata.fields().value_set_all(&values);
                journal.on_event(&Event::new(metadata, &values), ctx);
            }
            // Some of libraries' events have no message that could be another.
            Some(_) => eprintln!("<{}>{sentence}", priority(metadata.level())),
            None => {
                let now = humantime::format_rfc3339_micros(SystemTime::now());
                eprintln!("{now} {:>5} {sentence}", metadata.level());
            }
        }
    }
}

/// syslog(3)
fn priority(level: &Level) -> u8 {
    match *level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

/// What an event, or a span, says.
#[derive(Debug, Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, String)>,
}

impl Fields {
    fn get(&self, name: &str) -> Option<&str> {
        let mut others = self.others.iter();
        let (_, value) = others.find(|(known, _)| *known == name)?;
        Some(value)
    }

    fn put(&mut self, field: &Field, mut value: String) {
        cut(&mut value, LONGEST_VALUE);
        if field.name() == "message" {
            self.message = value;
            return;
        }
        match self
            .others
            .iter_mut()
            .find(|(name, _)| *name == field.name())
        {
            Some((_, old)) => *old = value,
            None => self.others.push((field.name(), value)),
        }
    }

    /// The message, then the fields, also those of the spans around, from the innermost one on. The
    /// innermost value counts.
    fn sentence<'f>(&'f self, spans: impl Iterator<Item = &'f Fields>) -> String {
        let mut text = String::new();
        for c in self.message.chars() {
            match c.is_control() {
                true => text.extend(c.escape_default()),
                false => text.push(c),
            }
        }
        let mut said: Vec<&str> = Vec::new();
        for (name, value) in std::iter::once(self).chain(spans).flat_map(|f| &f.others) {
            if said.contains(name) {
                continue;
            }
            said.push(name);
            let mut value = value.clone();
            cut(&mut value, LONGEST_SHOWN);
            let plain =
                !value.is_empty() && !value.contains(|c: char| c.is_control() || " \"".contains(c));
            let _ = if plain {
                write!(text, " {name}={value}")
            } else {
                write!(text, " {name}={value:?}")
            };
        }
        text
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}"));
    }
}

/// What was cut off shows.
fn cut(value: &mut String, limit: usize) {
    if value.len() > limit {
        let end = (0..=limit)
            .rev()
            .find(|end| value.is_char_boundary(*end))
            .unwrap_or(0);
        value.truncate(end);
        value.push('…');
    }
}

/// Lines that others can cause without end: so many in a while, and then a count of the rest.
pub struct LogRateLimit {
    burst: u32,
    interval: Duration,
    state: Mutex<LogRateState>,
}

struct LogRateState {
    since: Option<Instant>,
    written: u32,
    withheld: u64,
}

impl LogRateLimit {
    /// At most `burst` lines in each `interval`.
    pub const fn new(burst: u32, interval: Duration) -> Self {
        LogRateLimit {
            burst,
            interval,
            state: Mutex::new(LogRateState {
                since: None,
                written: 0,
                withheld: 0,
            }),
        }
    }

    /// Whether a line may be written, and how many before it were not.
    pub fn admit(&self, now: Instant) -> Option<u64> {
        let mut lines = self.state.lock();
        if lines
            .since
            .is_none_or(|since| now.saturating_duration_since(since) >= self.interval)
        {
            lines.since = Some(now);
            lines.written = 0;
        }
        if lines.written == self.burst {
            lines.withheld += 1;
            return None;
        }
        lines.written += 1;
        Some(std::mem::take(&mut lines.withheld))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// What tracing-journald is handed: for each event the spans around it and its own fields.
    #[derive(Clone, Default)]
    struct Recorder(Arc<Mutex<Vec<Fields>>>);

    impl<S: Subscriber> Layer<S> for Recorder {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let mut fields = Fields::default();
            event.record(&mut fields);
            self.0.lock().push(fields);
        }
    }

    fn handed_on(speak: impl FnOnce()) -> Fields {
        let recorder = Recorder::default();
        let layer = Sentences {
            journal: Some(recorder.clone()),
        };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), speak);
        recorder.0.lock().pop().unwrap()
    }

    #[test]
    fn an_event_has_its_facts_as_fields_and_with_those_of_its_spans_in_its_sentence() {
        let event = handed_on(|| {
            let operation = Uuid::from_u128(7);
            let span = action_span("abc", Some(operation), None);
            let _entered = span.enter();
            span.record("worker", "w");
            tracing::warn!(exit_code = 1, error = %"a \"b\"\nc", "failed");
        });
        assert_eq!(
            event.message,
            r#"failed exit_code=1 error="a \"b\"\nc" action=abc operation=00000000-0000-0000-0000-000000000007 worker=w"#
        );
        assert_eq!(event.get("exit_code"), Some("1"));
        assert_eq!(event.get("error"), Some("a \"b\"\nc"));
        // tracing-journald adds those of spans by itself.
        assert_eq!(event.get("action"), None);
    }

    #[test]
    fn the_innermost_value_counts_and_long_ones_are_cut() {
        let long = "ä".repeat(1 << 20);
        let event = handed_on(|| {
            let outer = tracing::info_span!("outer", worker = "outer", slot = 3);
            let _outer = outer.enter();
            let inner = tracing::info_span!("inner", worker = "inner");
            let _inner = inner.enter();
            tracing::info!(text = long, slot = 4, "x\n\u{1b}[2J{}", "y\r\n");
        });
        let sentence = event.message;
        assert!(
            sentence.starts_with("x\\n\\u{1b}[2Jy\\r\\n text="),
            "{sentence:?}"
        );
        assert!(sentence.ends_with("… slot=4 worker=inner"), "{sentence:?}");
        assert!(sentence.len() < 2 * LONGEST_SHOWN);
        assert!(event.others[0].1.len() < LONGEST_VALUE + 10);
    }

    #[test]
    fn what_others_cause_is_logged_so_often_and_then_counted() {
        let minute = Duration::from_secs(60);
        let limit = LogRateLimit::new(2, minute);
        let now = Instant::now();
        let said: Vec<_> = (0..5).map(|_| limit.admit(now)).collect();
        assert_eq!(said, [Some(0), Some(0), None, None, None]);
        assert_eq!(limit.admit(now + minute), Some(3));
        assert_eq!(limit.admit(now + minute), Some(0));
        assert_eq!(limit.admit(now + minute), None);
    }
}
