//! What a daemon logs: sentences for people, with their facts as fields for searches. They go to
//! systemd's journal when that reads standard error, else to standard error.
//!
//! 1. A field `action` of an event, or of a span around it, is the journal's field BB_ACTION: so
//!    `journalctl BB_ACTION=…` shows what all daemons said of an action. tracing-journald sends them.
//! 2. The sentence has the fields as well, since `journalctl -u` shows nothing else, and
//!    tracing-journald's would be the message alone: `Sentences` makes it the message before it hands
//!    an event on.
//! 3. An event's field `message_id` is the journal's MESSAGE_ID (`message_id`), by which people are alerted.
//! 4. Where `log.format` says so, each line on standard error is a JSON object, also where the journal
//!    reads it: for collectors that know no journal.
//! 5. Values may come from hostile actions and clients: they are cut at `LONGEST_VALUE`, and in the
//!    sentence sooner; control characters are escaped there, so that one entry is one line.

#![expect(
    unsafe_code,
    reason = "it limits the time that a library's socket blocks"
)]

use std::{
    collections::BTreeSet,
    fmt::{self, Write as _},
    fs,
    io::{self, Write as _},
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

use super::message_id;
use crate::{config, text::cut};

/// Bytes of one value.
const LONGEST_VALUE: usize = 8 << 10;

/// Bytes of one value in the sentence; the field has the rest.
const LONGEST_SHOWN: usize = 1 << 10;

/// Starts logging for the whole process, which has one thread as yet.
pub(super) fn start(program: &'static str, log: &config::Log) -> LevelHandle {
    let (filter, handle) = reload::Layer::new(targets(log.level));
    let is_json = log.format == config::LogFormat::Json;
    let reads = reads_standard_error() && !is_json;
    let journal = reads.then(|| journal(program, None).ok()).flatten();
    let layer_of = |id: &'static str| Some((id, journal_of(program, id)?));
    let identified = match &journal {
        Some(_) => message_id::ALL.into_iter().filter_map(layer_of).collect(),
        None => Vec::new(),
    };
    let sentences = Sentences {
        journal,
        identified,
        is_json,
    };
    // A second start, as in tests that run several daemons in one process, changes nothing.
    let _ = tracing_subscriber::registry()
        .with(sentences.with_filter(filter))
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

/// Libraries talk about every frame; only our own words count. Whoever floods a connection has h2 warn each time,
/// without saying who that is.
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
        .with_target("h2", LevelFilter::ERROR)
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

/// The same, whose entries have this MESSAGE_ID.
fn journal_of(program: &str, id: &'static str) -> Option<tracing_journald::Layer> {
    journal(program, Some(id)).ok()
}

fn journal(program: &str, id: Option<&str>) -> io::Result<tracing_journald::Layer> {
    let before = sockets()?;
    let layer = tracing_journald::Layer::new()?
        .with_custom_fields(id.map(|id| ("MESSAGE_ID", id)))
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
    /// Of events that have a `message_id`.
    identified: Vec<(&'static str, L)>,
    is_json: bool,
}

impl<S, L> Layer<S> for Sentences<L>
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    L: Layer<S>,
{
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, ctx: Context<'_, S>) {
        let mut fields = LogFields::default();
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
            && let Some(fields) = span.extensions_mut().get_mut::<LogFields>()
        {
            values.record(fields);
        }
        if let Some(journal) = &self.journal {
            journal.on_record(id, values, ctx);
        }
    }

    fn on_event(&self, event: &Event<'_>, ctx: Context<'_, S>) {
        let mut fields = LogFields::default();
        event.record(&mut fields);
        let id = fields.take("message_id");
        if self.is_json {
            let spans: Vec<_> = ctx.event_scope(event).into_iter().flatten().collect();
            let spans: Vec<_> = spans.iter().map(|span| span.extensions()).collect();
            let spans = spans.iter().filter_map(|span| span.get());
            let line = fields.json(event.metadata().level(), id.as_deref(), spans);
            write_line(line);
            return;
        }
        let sentence = {
            let spans: Vec<_> = ctx.event_scope(event).into_iter().flatten().collect();
            let spans: Vec<_> = spans.iter().map(|span| span.extensions()).collect();
            fields.sentence(spans.iter().filter_map(|span| span.get()))
        };
        let metadata = event.metadata();
        let of_id = |id: &String| self.identified.iter().find(|(known, _)| known == id);
        let identified = id.as_ref().and_then(of_id).map(|(_, journal)| journal);
        match identified.or(self.journal.as_ref()) {
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
            Some(_) => write_line(format!("<{}>{sentence}", priority(metadata.level()))),
            None => {
                let now = humantime::format_rfc3339_micros(SystemTime::now());
                write_line(format!("{now} {:>5} {sentence}", metadata.level()));
            }
        }
    }
}

/// Standard error has no buffer: `eprintln!` makes a system call for each part of a line.
fn write_line(mut line: String) {
    line.push('\n');
    let _ = io::stderr().write_all(line.as_bytes());
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
struct LogFields {
    message: String,
    others: Vec<(&'static str, String)>,
}

impl LogFields {
    fn get(&self, name: &str) -> Option<&str> {
        let mut others = self.others.iter();
        let (_, value) = others.find(|(known, _)| *known == name)?;
        Some(value)
    }

    fn take(&mut self, name: &str) -> Option<String> {
        let at = self.others.iter().position(|(known, _)| *known == name)?;
        Some(self.others.remove(at).1)
    }

    /// One object, with the fields of the spans around too; the innermost value counts.
    fn json<'f>(
        &'f self,
        level: &Level,
        id: Option<&str>,
        spans: impl Iterator<Item = &'f LogFields>,
    ) -> String {
        let now = humantime::format_rfc3339_micros(SystemTime::now()).to_string();
        let mut object = serde_json::Map::new();
        let mut put = |name: &str, value: &str| {
            object
                .entry(name)
                .or_insert_with(|| serde_json::Value::from(value));
        };
        put("time", &now);
        put("level", &level.to_string().to_lowercase());
        put("message", &self.message);
        if let Some(id) = id {
            put("message_id", id);
        }
        for (name, value) in std::iter::once(self).chain(spans).flat_map(|f| &f.others) {
            put(name, value);
        }
        serde_json::Value::Object(object).to_string()
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
    fn sentence<'f>(&'f self, spans: impl Iterator<Item = &'f LogFields>) -> String {
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

impl Visit for LogFields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}"));
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
    struct FieldsRecorder(Arc<Mutex<Vec<LogFields>>>);

    impl<S: Subscriber> Layer<S> for FieldsRecorder {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let mut fields = LogFields::default();
            event.record(&mut fields);
            self.0.lock().push(fields);
        }
    }

    fn handed_on(speak: impl FnOnce()) -> LogFields {
        let recorder = FieldsRecorder::default();
        let layer = Sentences {
            journal: Some(recorder.clone()),
            identified: Vec::new(),
            is_json: false,
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
    fn an_event_that_people_are_alerted_of_is_the_journals_with_its_number() {
        let (plain, identified) = (FieldsRecorder::default(), FieldsRecorder::default());
        let layer = Sentences {
            journal: Some(plain.clone()),
            identified: vec![(message_id::WORKER_GONE, identified.clone())],
            is_json: false,
        };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            tracing::warn!(message_id = message_id::WORKER_GONE, worker = "w", "gone");
            tracing::warn!(message_id = message_id::UNKILLABLE, "there");
        });
        assert_eq!(identified.0.lock()[0].message, "gone worker=w");
        assert_eq!(identified.0.lock()[0].get("message_id"), None);
        assert_eq!(plain.0.lock()[0].message, "there");
        assert_eq!(plain.0.lock().len(), 1);
    }

    #[test]
    fn a_line_of_json_has_the_facts_of_the_event_and_of_its_spans() {
        let field = |name: &'static str, value: &str| (name, value.to_owned());
        let event = LogFields {
            message: "failed\n".to_owned(),
            others: vec![field("error", "a \"b\""), field("time", "no")],
        };
        let span = LogFields {
            message: String::new(),
            others: vec![field("action", "abc"), field("error", "outer")],
        };
        let line = event.json(&Level::WARN, Some("id"), std::iter::once(&span));
        let read: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(read["error"], "a \"b\"");
        assert_eq!(
            (&read["action"], &read["level"]),
            (&"abc".into(), &"warn".into())
        );
        assert_eq!(
            (&read["message"], &read["message_id"]),
            (&"failed\n".into(), &"id".into())
        );
        assert_ne!(read["time"], "no");
        assert_eq!(line.lines().count(), 1);
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
