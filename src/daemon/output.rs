//! What a command prints: tables for people, JSON for scripts.
//!
//! 1. All that a terminal is shown passes through `text::printable`, since most of it was named by
//!    clients; only this file writes escape sequences, and only to a terminal.
//! 2. A table fits the terminal: columns that may be cut are, the widest first. Where there is no
//!    terminal, they have room for all but what is out of all proportion.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal, Write as _},
    time::{Duration, SystemTime},
};

use serde::Serialize;

use crate::text::printable;

/// Where a command prints, and how.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    is_json: bool,
    /// Of a terminal.
    width: Option<usize>,
    has_colours: bool,
}

/// What a cell's content means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Emphasis {
    /// Nothing out of the ordinary.
    #[default]
    None,
    /// As it should be.
    Good,
    /// To be looked at.
    Warning,
    /// Failed.
    Bad,
}

/// One cell of a table.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    text: String,
    emphasis: Emphasis,
}

/// Rows under headings. A column whose heading ends in `…` may be cut.
#[derive(Clone, Debug)]
pub struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

/// No column is cut below this.
const NARROWEST: usize = 5;
/// No column that may be cut is wider than this.
const WIDEST: usize = 140;

impl<T: ToString> From<T> for Cell {
    fn from(value: T) -> Self {
        Cell {
            text: value.to_string(),
            emphasis: Emphasis::None,
        }
    }
}

impl Cell {
    /// A cell that stands out.
    pub fn new(text: impl ToString, emphasis: Emphasis) -> Self {
        Cell {
            text: text.to_string(),
            emphasis,
        }
    }
}

impl Emphasis {
    /// SGR parameters (ECMA-48).
    fn sgr(self) -> Option<&'static str> {
        match self {
            Emphasis::None => None,
            Emphasis::Good => Some("32"),
            Emphasis::Warning => Some("33"),
            Emphasis::Bad => Some("31"),
        }
    }
}

impl Table {
    /// Without rows yet.
    pub fn new<const N: usize>(headings: [&'static str; N]) -> Self {
        Table {
            headings: headings.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row, with a cell for each heading.
    pub fn row<const N: usize>(&mut self, cells: [Cell; N]) {
        debug_assert_eq!(N, self.headings.len());
        self.rows.push(cells.into());
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    fn widths(&self, available: Option<usize>) -> Vec<usize> {
        let column = |number: usize| {
            let cells = self.rows.iter().map(|row| columns(&row[number].text));
            let widest = cells.max().unwrap_or(0).max(columns(self.heading(number)));
            match self.may_be_cut(number) {
                true => widest.min(WIDEST),
                false => widest,
            }
        };
        let mut widths: Vec<usize> = (0..self.headings.len()).map(column).collect();
        let Some(available) = available else {
            return widths;
        };
        let gaps = 2 * widths.len().saturating_sub(1);
        while widths.iter().sum::<usize>() + gaps > available {
            let widest = (0..widths.len())
                .filter(|number| self.may_be_cut(*number))
                .max_by_key(|number| widths[*number]);
            match widest {
                Some(number) if widths[number] > NARROWEST => widths[number] -= 1,
                _ => break,
            }
        }
        widths
    }

    fn may_be_cut(&self, number: usize) -> bool {
        self.headings[number].ends_with('…')
    }

    fn heading(&self, number: usize) -> &'static str {
        self.headings[number].trim_end_matches('…')
    }

    fn render(&self, output: &Output) -> String {
        // What is measured is what is shown.
        let mut shown = self.clone();
        for cell in shown.rows.iter_mut().flatten() {
            cell.text = printable(&cell.text).into_owned();
        }
        let widths = shown.widths(output.width);
        let headings = (0..self.headings.len()).map(|number| Cell::from(self.heading(number)));
        let mut text = String::new();
        for row in std::iter::once(headings.collect()).chain(shown.rows) {
            let mut line = String::new();
            let last = row.len() - 1;
            for (number, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let content = cut(&cell.text, *width);
                let padding = match number == last {
                    true => 0,
                    false => width + 2 - columns(&content),
                };
                line += &output.emphasized(&content, cell.emphasis);
                line.extend(std::iter::repeat_n(' ', padding));
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

/// Columns of a terminal: wide characters of East Asian scripts and most pictures have two.
fn columns(text: &str) -> usize {
    let of = |c: char| match c {
        '\u{1100}'..='\u{115f}'
        | '\u{2e80}'..='\u{a4cf}'
        | '\u{ac00}'..='\u{d7a3}'
        | '\u{f900}'..='\u{faff}'
        | '\u{fe30}'..='\u{fe6f}'
        | '\u{ff00}'..='\u{ff60}'
        | '\u{ffe0}'..='\u{ffe6}'
        | '\u{1f300}'..='\u{1faff}'
        | '\u{20000}'..='\u{3fffd}' => 2,
        _ => 1,
    };
    text.chars().map(of).sum()
}

fn cut(text: &str, width: usize) -> String {
    if columns(text) <= width {
        return text.to_owned();
    }
    let mut shown = String::new();
    for c in text.chars() {
        if columns(&shown) + columns(c.encode_utf8(&mut [0; 4])) + 1 > width {
            break;
        }
        shown.push(c);
    }
    shown.push('…');
    shown
}

impl Output {
    /// The standard output, and what its terminal can do.
    pub fn of_process(is_json: bool) -> Self {
        let stdout = io::stdout();
        let is_terminal = stdout.is_terminal() && !is_json;
        let size = || rustix::termios::tcgetwinsize(&stdout).ok();
        let width = is_terminal.then(size).flatten();
        let width = width
            .map(|size| usize::from(size.ws_col))
            .filter(|width| *width > 0);
        // https://no-color.org, and terminals that know no colours.
        let refuses = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_none_or(|terminal| terminal == "dumb");
        Output {
            is_json,
            width: width.or(is_terminal.then_some(80)),
            has_colours: is_terminal && !refuses,
        }
    }

    /// Whether a script reads it.
    pub fn is_json(&self) -> bool {
        self.is_json
    }

    fn emphasized(&self, text: &str, emphasis: Emphasis) -> String {
        match emphasis.sgr().filter(|_| self.has_colours) {
            Some(sgr) => format!("\x1b[{sgr}m{text}\x1b[0m"),
            None => text.to_owned(),
        }
    }

    /// Prints a table, for people.
    pub fn table(&self, table: &Table) {
        write(&table.render(self));
    }

    /// Prints a line, for people.
    pub fn line(&self, text: &str) {
        write(&format!("{}\n", printable(text)));
    }

    /// Prints what has a name, for people.
    pub fn fact(&self, name: &str, cell: impl Into<Cell>) {
        let cell = cell.into();
        let text = self.emphasized(&printable(&cell.text), cell.emphasis);
        write(&format!("{name:<18}{text}\n"));
    }

    /// Prints lines of a text as they are, but for what is not printable.
    pub fn text(&self, text: &str) {
        text.lines().for_each(|line| self.line(line));
    }

    /// Prints one JSON value on a line of its own, for scripts.
    pub fn json(&self, value: &impl Serialize) {
        match serde_json::to_string(value) {
            // JSON leaves what is beyond ASCII as it is, and somebody may look at it.
            Ok(json) => write(&format!("{}\n", ascii(&json))),
            Err(error) => eprintln!("could not write JSON: {error}"),
        }
    }
}

/// JSON with what is not printable as its escapes (RFC 8259, section 7).
fn ascii(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        let is_printable = matches!(
            printable(c.encode_utf8(&mut [0; 4])),
            std::borrow::Cow::Borrowed(_)
        );
        match is_printable {
            true => text.push(c),
            false => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(text, "\\u{unit:04x}");
                }
            }
        }
    }
    text
}

/// A reader that has left, such as `head`, is no failure.
fn write(text: &str) {
    if let Err(error) = io::stdout().lock().write_all(text.as_bytes()) {
        let code = match error.kind() {
            io::ErrorKind::BrokenPipe => 0,
            _ => 1,
        };
        std::process::exit(code);
    }
}

/// A time span in its two largest units, for people: `3 d 4 h`, `12 s`.
pub fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let parts = [
        (seconds / 86_400, "d"),
        (seconds / 3600 % 24, "h"),
        (seconds / 60 % 60, "min"),
        (seconds % 60, "s"),
    ];
    let first = parts.iter().position(|(count, _)| *count > 0).unwrap_or(3);
    let shown = parts[first..]
        .iter()
        .take(2)
        .filter(|(count, _)| *count > 0);
    let shown: Vec<String> = shown
        .map(|(count, unit)| format!("{count} {unit}"))
        .collect();
    match shown.is_empty() {
        true => "0 s".to_owned(),
        false => shown.join(" "),
    }
}

/// How long ago a time was, for people; 0 s for one to come.
pub fn age(time: SystemTime) -> String {
    span(SystemTime::now().duration_since(time).unwrap_or_default())
}

/// Bytes in the unit that makes them a number of one to four digits.
pub fn bytes(count: u64) -> String {
    let (mut scaled, mut unit) = (count as f64, 0);
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    while scaled >= 1024.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{count} B"),
        _ => format!("{scaled:.1} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terminal(width: usize) -> Output {
        Output {
            is_json: false,
            width: Some(width),
            has_colours: true,
        }
    }

    #[test]
    fn a_table_fits_the_terminal_and_shows_no_escape_of_others() {
        let mut table = Table::new(["NAME", "TARGET…", "STATE"]);
        table.row([
            "a".into(),
            "//a:\u{1b}]0;evil\u{7}\u{202e}漢字漢字漢字漢字漢字漢字漢字漢字".into(),
            Cell::new("failed", Emphasis::Bad),
        ]);
        let text = table.render(&terminal(40));
        assert!(
            !text.contains("\u{1b}]") && !text.contains('\u{202e}'),
            "{text:?}"
        );
        assert!(text.contains("\u{1b}[31mfailed\u{1b}[0m"));
        let plain = text.replace("\u{1b}[31m", "").replace("\u{1b}[0m", "");
        for line in plain.lines() {
            assert!(columns(line) <= 40, "{line}");
        }
        assert!(plain.contains('…'));
        let whole = Output {
            width: None,
            has_colours: false,
            is_json: false,
        };
        let text = table.render(&whole);
        assert!(
            text.contains("漢字\u{20}\u{20}failed") && !text.contains('\u{1b}'),
            "{text:?}"
        );
        table.row(["b".into(), "x".repeat(400).into(), "good".into()]);
        for line in table.render(&whole).lines() {
            assert!(columns(line) <= WIDEST + 20, "{line}");
        }
    }

    #[test]
    fn json_has_no_character_that_a_terminal_obeys() {
        let json = serde_json::to_string("\u{202e}\u{e0001}ü\u{9b}\u{1b}").unwrap();
        let shown = ascii(&json);
        assert_eq!(shown, "\"\\u202e\\udb40\\udc01ü\\u009b\\u001b\"");
        let read: String = serde_json::from_str(&shown).unwrap();
        assert_eq!(read, "\u{202e}\u{e0001}ü\u{9b}\u{1b}");
    }

    #[test]
    fn spans_and_sizes_are_short() {
        let shown = [0, 59, 61, 3600, 90_061].map(|seconds| span(Duration::from_secs(seconds)));
        assert_eq!(shown, ["0 s", "59 s", "1 min 1 s", "1 h", "1 d 1 h"]);
        assert_eq!(
            [0, 1023, 1536, 20 << 30].map(bytes),
            ["0 B", "1023 B", "1.5 KiB", "20.0 GiB"]
        );
    }
}
