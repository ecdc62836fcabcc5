//! Entries in systemd's journal: one sentence for people, and its facts as fields for searches.
//!
//! 1. A tracing field `action` is the journal field BB_ACTION, so that `journalctl BB_ACTION=…`
//!    finds what any daemon said about that action; fields of the spans around count too.
//! 2. The sentence has the fields as well, since `journalctl -u` shows nothing else. (This is why
//!    the tracing-journald crate does not do: its sentence is the message alone.)
//! 3. Values may come from hostile actions and clients: they are cut at `LIMIT`, and in the
//!    sentence sooner; control characters are escaped there, so that one entry is one line.
//! 4. Without a journal, the same sentences go to standard error.
//!
//! The protocol is systemd's "Native Journal Protocol": one datagram per entry, a field being
//! `NAME\n`, its length as 64 bits little endian, its value, `\n`.

use std::{
    fmt::{self, Write},
    os::unix::net::UnixDatagram,
    time::Duration,
};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{
    Layer,
    layer::Context,
    registry::{LookupSpan, SpanRef},
};

const SOCKET: &str = "/run/systemd/journal/socket";
/// Bytes of one value; a whole entry must fit into a datagram (net.core.wmem_default).
const LIMIT: usize = 8 << 10;

/// Of one value in the sentence; the field has the rest.
const SHOWN: usize = 1 << 10;

pub struct Journal {
    output: Output,
    program: &'static str,
}

enum Output {
    Journal(UnixDatagram),
    StandardError,
}

/// Whether standard error is read by the journal (systemd.exec(5), JOURNAL_STREAM).
pub fn reads_standard_error() -> bool {
    let ours = || {
        let stream = std::env::var("JOURNAL_STREAM").ok()?;
        let (device, inode) = stream.split_once(':')?;
        let stat = nix::sys::stat::fstat(std::io::stderr()).ok()?;
        Some(stat.st_dev.to_string() == device && stat.st_ino.to_string() == inode)
    };
    ours().unwrap_or(false)
}

/// Tells on standard error what somebody must act upon; the journal takes it for an error
/// (sd-daemon(3)).
pub fn complain(program: &str, text: &str) {
    let prefix = if reads_standard_error() { "<3>" } else { "" };
    for line in format!("{program}: {text}").lines() {
        eprintln!("{prefix}{line}");
    }
}

impl Journal {
    /// Standard error, unless systemd reads that and the journal can be reached.
    pub fn open(program: &'static str) -> Self {
        let output = match connect() {
            Some(socket) => Output::Journal(socket),
            None => Output::StandardError,
        };
        Journal { output, program }
    }
}

fn connect() -> Option<UnixDatagram> {
    if !reads_standard_error() {
        return None;
    }
    let socket = UnixDatagram::unbound().ok()?;
    socket.connect(SOCKET).ok()?;
    // A journal that hangs must not make the daemon hang.
    socket
        .set_write_timeout(Some(Duration::from_secs(1)))
        .ok()?;
    Some(socket)
}

impl<S: Subscriber + for<'s> LookupSpan<'s>> Layer<S> for Journal {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, ctx: Context<'_, S>) {
        let mut facts = Facts::default();
        attributes.record(&mut facts);
        if let Some(span) = ctx.span(id) {
            span.extensions_mut().insert(facts);
        }
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, ctx: Context<'_, S>) {
        if let Some(span) = ctx.span(id)
            && let Some(facts) = span.extensions_mut().get_mut::<Facts>()
        {
            values.record(facts);
        }
    }

    fn on_event(&self, event: &Event<'_>, ctx: Context<'_, S>) {
        let mut facts = Facts::default();
        event.record(&mut facts);
        let mut span = ctx.event_span(event);
        while let Some(around) = span {
            facts.inherit(&around);
            span = around.parent();
        }
        let level = event.metadata().level();
        match &self.output {
            Output::Journal(socket) => {
                let entry = facts.entry(self.program, priority(level));
                if socket.send(&entry).is_err() {
                    eprintln!("<{}>{}", priority(level), facts.sentence());
                }
            }
            Output::StandardError => {
                let now = humantime::format_rfc3339_micros(std::time::SystemTime::now());
                eprintln!("{now} {level:>5} {}", facts.sentence());
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
struct Facts {
    message: String,
    fields: Vec<(&'static str, String)>,
}

impl Facts {
    fn inherit<'s, S: LookupSpan<'s>>(&mut self, span: &SpanRef<'s, S>) {
        if let Some(around) = span.extensions().get::<Facts>() {
            for (name, value) in &around.fields {
                if !self.fields.iter().any(|(known, _)| known == name) {
                    self.fields.push((name, value.clone()));
                }
            }
        }
    }

    fn put(&mut self, field: &Field, mut value: String) {
        cut(&mut value, LIMIT);
        if field.name() == "message" {
            self.message = value;
        } else if let Some((_, old)) = self
            .fields
            .iter_mut()
            .find(|(name, _)| *name == field.name())
        {
            *old = value;
        } else {
            self.fields.push((field.name(), value));
        }
    }

    fn sentence(&self) -> String {
        let mut text = String::new();
        for c in self.message.chars() {
            match c.is_control() {
                true => text.extend(c.escape_default()),
                false => text.push(c),
            }
        }
        for (name, value) in &self.fields {
            let mut value = value.clone();
            cut(&mut value, SHOWN);
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

    fn entry(&self, program: &str, priority: u8) -> Vec<u8> {
        let mut entry = Vec::new();
        let mut put = |name: &str, value: &str| {
            entry.extend_from_slice(name.as_bytes());
            entry.push(b'\n');
            entry.extend_from_slice(&(value.len() as u64).to_le_bytes());
            entry.extend_from_slice(value.as_bytes());
            entry.push(b'\n');
        };
        put("PRIORITY", &priority.to_string());
        put("SYSLOG_IDENTIFIER", program);
        put("MESSAGE", &self.sentence());
        for (name, value) in &self.fields {
            let mut name: String = name
                .chars()
                .map(|c| match c.to_ascii_uppercase() {
                    c @ ('A'..='Z' | '0'..='9') => c,
                    _ => '_',
                })
                .collect();
            name.insert_str(0, "BB_");
            name.truncate(64);
            put(&name, value);
        }
        entry
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

impl Visit for Facts {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// The fields of an entry, read back as the journal reads them.
    fn fields(mut entry: &[u8]) -> Vec<(String, String)> {
        let mut fields = Vec::new();
        while !entry.is_empty() {
            let end = entry.iter().position(|byte| *byte == b'\n').unwrap();
            let name = String::from_utf8(entry[..end].to_vec()).unwrap();
            let length = u64::from_le_bytes(entry[end + 1..end + 9].try_into().unwrap()) as usize;
            let value = String::from_utf8(entry[end + 9..end + 9 + length].to_vec()).unwrap();
            assert_eq!(entry[end + 9 + length], b'\n');
            fields.push((name, value));
            entry = &entry[end + 10 + length..];
        }
        fields
    }

    fn entries(speak: impl FnOnce()) -> Vec<Vec<(String, String)>> {
        let (here, there) = UnixDatagram::pair().unwrap();
        let journal = Journal {
            output: Output::Journal(there),
            program: "bb_test",
        };
        let read = Arc::new(Mutex::new(Vec::new()));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(journal), speak);
        let mut buffer = vec![0; 1 << 20];
        here.set_nonblocking(true).unwrap();
        while let Ok(length) = here.recv(&mut buffer) {
            read.lock().unwrap().push(fields(&buffer[..length]));
        }
        Arc::into_inner(read).unwrap().into_inner().unwrap()
    }

    #[test]
    fn an_entry_has_its_facts_as_fields_and_in_its_sentence() {
        let entries = entries(|| {
            let span = tracing::info_span!("action", action = "abc", slot = 3);
            let _entered = span.enter();
            tracing::warn!(exit_code = 1, error = %"a \"b\"\nc", "failed");
        });
        let expected = [
            ("PRIORITY", "4"),
            ("SYSLOG_IDENTIFIER", "bb_test"),
            (
                "MESSAGE",
                r#"failed exit_code=1 error="a \"b\"\nc" action=abc slot=3"#,
            ),
            ("BB_EXIT_CODE", "1"),
            ("BB_ERROR", "a \"b\"\nc"),
            ("BB_ACTION", "abc"),
            ("BB_SLOT", "3"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(entries, [expected]);
    }

    #[test]
    fn the_innermost_value_counts_and_long_ones_are_cut() {
        let long = "ä".repeat(1 << 20);
        let entries = entries(|| {
            let outer = tracing::info_span!("outer", worker = "outer", action = "a");
            let _outer = outer.enter();
            let inner = tracing::info_span!("inner", worker = "inner");
            let _inner = inner.enter();
            tracing::info!(text = long, action = "b", "x\n\u{1b}[2J{}", "y\r\n");
        });
        let sentence = entries[0]
            .iter()
            .find(|(name, _)| name == "MESSAGE")
            .unwrap();
        assert!(
            sentence.1.starts_with("x\\n\\u{1b}[2Jy\\r\\n text="),
            "{sentence:?}"
        );
        assert!(sentence.1.len() < 2 * SHOWN);
        let value = |name: &str| {
            let found = entries[0].iter().find(|(known, _)| known == name).unwrap();
            found.1.clone()
        };
        assert_eq!(value("BB_WORKER"), "inner");
        assert_eq!(value("BB_ACTION"), "b");
        assert!(value("BB_TEXT").len() < LIMIT + 10);
        assert_eq!(value("PRIORITY"), "6");
    }
}
