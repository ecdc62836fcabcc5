//! What an action printed: colours kept, all else harmless, huge ones in part.
//!
//! Of escape sequences (ECMA-48), those that choose colours and weight become classes; others are left
//! out. What would change how text looks, and is no escape sequence, is shown as its escape.

use std::collections::BTreeSet;

use maud::{Markup, PreEscaped, html};

use super::{
    Place,
    read::{self, Problem},
};
use crate::{
    digest::Digest,
    scheduler::web::{Pages, format::size},
};

/// Bytes of a log that are shown: so many of its beginning, and of its end.
const HEAD: u64 = 32 << 10;
const TAIL: u64 = 128 << 10;

/// How text looks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Look {
    /// `f` and `b` with the number of a colour: of the text, and of what is behind it.
    foreground: Option<u8>,
    background: Option<u8>,
    others: BTreeSet<&'static str>,
}

impl Look {
    fn classes(&self) -> String {
        let mut classes: Vec<String> = self
            .others
            .iter()
            .map(|class| (*class).to_owned())
            .collect();
        classes.extend(self.foreground.map(|colour| format!("f{colour}")));
        classes.extend(self.background.map(|colour| format!("b{colour}")));
        classes.join(" ")
    }

    /// Select Graphic Rendition (ECMA-48, section 8.3.117).
    fn select(&mut self, parameters: &str) {
        let numbers = parameters.split([';', ':']);
        let mut numbers = numbers.map(|number| number.parse::<u32>().unwrap_or(0));
        while let Some(number) = numbers.next() {
            match number {
                0 => *self = Look::default(),
                1 => drop(self.others.insert("bold")),
                2 => drop(self.others.insert("dim")),
                3 => drop(self.others.insert("italic")),
                4 => drop(self.others.insert("underlined")),
                7 => drop(self.others.insert("inverse")),
                9 => drop(self.others.insert("struck")),
                22 => self
                    .others
                    .retain(|class| !matches!(*class, "bold" | "dim")),
                23 => drop(self.others.remove("italic")),
                24 => drop(self.others.remove("underlined")),
                27 => drop(self.others.remove("inverse")),
                29 => drop(self.others.remove("struck")),
                30..=37 => self.foreground = Some((number - 30) as u8),
                39 => self.foreground = None,
                40..=47 => self.background = Some((number - 40) as u8),
                49 => self.background = None,
                90..=97 => self.foreground = Some((number - 82) as u8),
                100..=107 => self.background = Some((number - 92) as u8),
                38 | 48 => {
                    let colour = match numbers.next() {
                        Some(5) => numbers.next().map(nearest),
                        Some(2) => {
                            let rgb = [numbers.next(), numbers.next(), numbers.next()];
                            Some(nearest_of(rgb.map(Option::unwrap_or_default)))
                        }
                        _ => None,
                    };
                    match number {
                        38 => self.foreground = colour,
                        _ => self.background = colour,
                    }
                }
                _ => {}
            }
        }
    }
}

/// Of the 256 colours of xterm, the one of sixteen that is nearest.
fn nearest(colour: u32) -> u8 {
    match colour {
        0..16 => colour as u8,
        16..232 => {
            let cube = colour - 16;
            nearest_of([cube / 36, cube / 6 % 6, cube % 6].map(|level| level * 51))
        }
        _ => nearest_of([(colour.min(255) - 232) * 10 + 8; 3]),
    }
}

fn nearest_of([red, green, blue]: [u32; 3]) -> u8 {
    let most = red.max(green).max(blue);
    let least = red.min(green).min(blue);
    if most - least < 40 {
        return match most {
            0..64 => 0,
            64..160 => 8,
            160..224 => 7,
            _ => 15,
        };
    }
    let is_on = |part: u32| u8::from(part * 2 > most);
    let colour = is_on(red) | is_on(green) << 1 | is_on(blue) << 2;
    colour + if most > 192 { 8 } else { 0 }
}

/// Text with colours, as markup.
pub(in crate::scheduler::web) fn coloured(data: &[u8]) -> Markup {
    let text = String::from_utf8_lossy(data);
    let mut look = Look::default();
    let mut out = String::with_capacity(text.len() + 64);
    for (number, line) in text.split('\n').enumerate() {
        if number > 0 {
            out.push('\n');
        }
        write_line(last_writing(line), &mut look, &mut out);
    }
    PreEscaped(out)
}

/// What a terminal shows of a line that was written over: what came last.
fn last_writing(line: &str) -> &str {
    let line = line.trim_end_matches('\r');
    line.rsplit('\r').next().unwrap_or(line)
}

fn write_line(line: &str, look: &mut Look, out: &mut String) {
    let mut rest = line;
    while let Some(at) = rest.find('\u{1b}') {
        let (text, sequence) = rest.split_at(at);
        write_text(text, look, out);
        rest = after_sequence(sequence, look);
    }
    write_text(rest, look, out);
}

/// What comes after an escape sequence at the beginning of a text.
fn after_sequence<'t>(text: &'t str, look: &mut Look) -> &'t str {
    let body = text.get(1..).unwrap_or_default();
    match body.bytes().next() {
        Some(b'[') => {
            let body = body.get(1..).unwrap_or_default();
            let end = body.find(|c: char| ('\u{40}'..='\u{7e}').contains(&c));
            let Some(end) = end else { return "" };
            let (parameters, rest) = body.split_at(end);
            if rest.starts_with('m') && parameters.len() <= 64 {
                look.select(parameters);
            }
            rest.get(1..).unwrap_or_default()
        }
        // Strings, which end with BEL or ST.
        Some(b']' | b'P' | b'_' | b'^' | b'X') => {
            let end = body.find(['\u{7}', '\u{1b}']);
            match end.map(|end| body.split_at(end)) {
                Some((_, rest)) if rest.starts_with('\u{7}') => rest.get(1..).unwrap_or_default(),
                Some((_, rest)) => rest.strip_prefix("\u{1b}\\").unwrap_or(rest),
                None => "",
            }
        }
        Some(b'(' | b')' | b'#') => {
            let mut rest = body.chars();
            rest.next();
            rest.next();
            rest.as_str()
        }
        Some(_) => {
            let mut rest = body.chars();
            rest.next();
            rest.as_str()
        }
        None => "",
    }
}

/// Controls, marks of direction, and what has no width, but for what belongs to the character before it.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{feff}' | '\u{200b}' | '\u{200e}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

fn write_text(text: &str, look: &Look, out: &mut String) {
    if text.is_empty() {
        return;
    }
    let mut shown = String::with_capacity(text.len());
    for (number, part) in text.split('\t').enumerate() {
        if number > 0 {
            shown.push('\t');
        }
        for c in part.chars() {
            match is_hidden(c) {
                true => shown.extend(c.escape_default()),
                false => shown.push(c),
            }
        }
    }
    let classes = look.classes();
    let markup = match classes.is_empty() {
        true => html! { (shown) },
        false => html! { span class=(classes) { (shown) } },
    };
    out.push_str(&markup.0);
}

/// A frame around what was printed.
pub(in crate::scheduler::web) fn frame(title: &str, content: &Markup) -> Markup {
    html! {
        pre.log tabindex="0" role="region" aria-label=(title) { (content) }
    }
}

/// A log that is in the storage, with a link to all of it.
pub(super) async fn of_blob(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
    title: &str,
) -> Result<Markup, Problem> {
    let all = digest.size();
    let is_whole = all <= HEAD + TAIL;
    let (head, tail) = match is_whole {
        true => (
            read::bytes(pages, place, digest, HEAD + TAIL)
                .await?
                .to_vec(),
            Vec::new(),
        ),
        false => {
            let head = read::part(pages, place, digest, 0, HEAD).await?;
            (
                head,
                read::part(pages, place, digest, all - TAIL, all).await?,
            )
        }
    };
    let shown = html! {
        (coloured(&head))
        @if !is_whole {
            "\n"
            span.cut { "… " (size(all - HEAD - TAIL)) " left out: download it to see them …" }
            "\n"
            (coloured(&tail))
        }
    };
    Ok(html! {
        p {
            (size(all)) " · "
            a href=(place.file_address(digest, title)) { "Download" }
        }
        (frame(title, &shown))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        coloured(text.as_bytes()).into_string()
    }

    #[test]
    fn colours_become_classes_and_markup_stays_text() {
        assert_eq!(
            shown("a\u{1b}[1;31m<b>\u{1b}[0m&\u{1b}[38;5;196mx\u{1b}[39my"),
            "a<span class=\"bold f1\">&lt;b&gt;</span>&amp;<span class=\"f9\">x</span>y"
        );
        assert_eq!(
            shown("\u{1b}[32mok\nstill"),
            "<span class=\"f2\">ok</span>\n<span class=\"f2\">still</span>"
        );
        assert_eq!(
            shown("\u{1b}[38;2;0;0;255mx"),
            "<span class=\"f12\">x</span>"
        );
    }

    #[test]
    fn other_sequences_are_left_out_and_other_controls_are_told() {
        assert_eq!(shown("a\u{1b}[2Jb\u{1b}]0;title\u{7}c\u{1b}(Bd"), "abcd");
        assert_eq!(
            shown("\u{1b}]8;;http://x\u{1b}\\link\u{1b}]8;;\u{1b}\\"),
            "link"
        );
        assert_eq!(shown("10%\r20%\r\n"), "20%\n");
        assert_eq!(shown("a\u{202e}b\u{8}"), "a\\u{202e}b\\u{8}");
        assert_eq!(shown("a\tb"), "a\tb");
        for hostile in [
            "\u{1b}",
            "\u{1b}[",
            "\u{1b}[999999999999999999m",
            "\u{1b}]",
            "\u{1b}[38;5m",
            "\u{1b}[38m",
            "\u{1b}ü",
        ] {
            shown(hostile);
        }
        assert_eq!(coloured(&[0xff, b'a']).into_string(), "\u{fffd}a");
    }
}
