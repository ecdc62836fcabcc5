//! Texts: what a message or a terminal shows of one that a peer sent, lists of words, and bytes as lower-case hexadecimal digits.

#![warn(missing_docs)]

use std::{borrow::Cow, error::Error, iter};

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// The value of each hexadecimal digit; 0xff for any other byte.
const VALUES: [u8; 256] = {
    let mut table = [0xff; 256];
    let mut value = 0;
    while value < 16 {
        table[DIGITS[value] as usize] = value as u8;
        value += 1;
    }
    table
};

/// What a message shows of a text that a peer sent, which may be of any length.
pub fn shorten(text: &str) -> String {
    const SHOWN: usize = 140;
    if text.chars().count() <= SHOWN {
        return text.to_owned();
    }
    let mut shown: String = text.chars().take(SHOWN).collect();
    shown.push('…');
    shown
}

/// A text about an error, followed by those of the error's causes that it does not have yet.
pub fn with_causes(mut text: String, error: &dyn Error) -> String {
    for cause in iter::successors(error.source(), |cause| (*cause).source()) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Leaves at most so many bytes of a text, and shows that something was cut off.
pub fn cut(text: &mut String, limit: usize) {
    if text.len() > limit {
        let end = (0..=limit).rev().find(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or(0));
        text.push('…');
    }
}

/// What a terminal may be shown of a text that somebody else chose: on one line, without what moves the
/// cursor, changes colours, hides, or turns the direction of reading (Unicode's categories C, Zl and Zp).
/// Such characters are written as Rust does, `\u{202e}`.
pub fn printable(text: &str) -> Cow<'_, str> {
    // Quotes and backslashes do no harm; all else that Rust escapes does.
    let is_plain = |c: char| matches!(c, '"' | '\'' | '\\') || c.escape_debug().len() == 1;
    if text.chars().all(is_plain) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match is_plain(c) {
            true => shown.push(c),
            false => shown.extend(c.escape_debug()),
        }
    }
    Cow::Owned(shown)
}

/// A word as any POSIX shell reads it back, for scripts (XCU, section 2.2).
pub fn posix_shell_word(word: &str) -> Cow<'_, str> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=+,@%".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => Cow::Borrowed(word),
        false => Cow::Owned(format!("'{}'", word.replace('\'', "'\\''"))),
    }
}

/// A word as bash reads it back, in characters that do a terminal no harm (bash(1), QUOTING).
pub fn shell_word(word: &str) -> Cow<'_, str> {
    if printable(word) == word {
        return posix_shell_word(word);
    }
    let mut quoted = String::from("$'");
    for byte in word.bytes() {
        match byte {
            b'\'' | b'\\' => quoted.extend(['\\', char::from(byte)]),
            b' '..=b'~' => quoted.push(char::from(byte)),
            _ => quoted.push_str(&format!("\\x{byte:02x}")),
        }
    }
    quoted.push('\'');
    Cow::Owned(quoted)
}

/// Lists words for a message: `"a", "b" or "c"`.
pub fn one_of(words: &[&str]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
        None => String::new(),
    }
}

/// How many of something there are: `1 worker`, `2 workers`.
pub fn plural(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// Appends two digits for each byte.
pub fn push_hex(text: &mut String, bytes: &[u8]) {
    // Arithmetic on a buffer is done for many bytes at once; pushes and tables are not.
    let digit = |value: u8| value + if value < 10 { b'0' } else { b'a' - 10 };
    for bytes in bytes.chunks(32) {
        let mut digits = [0; 64];
        for (pair, byte) in digits.as_chunks_mut().0.iter_mut().zip(bytes) {
            *pair = [digit(byte >> 4), digit(byte & 15)];
        }
        let digits = digits.get(..2 * bytes.len()).unwrap_or_default();
        text.push_str(str::from_utf8(digits).unwrap_or_default());
    }
}

/// Reads two digits for each byte. False when the text has not exactly these, or has other characters.
pub fn parse_hex(text: &str, bytes: &mut [u8]) -> bool {
    if text.len() != 2 * bytes.len() {
        return false;
    }
    let mut all = 0;
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let (high, low) = (VALUES[usize::from(pair[0])], VALUES[usize::from(pair[1])]);
        *byte = high << 4 | low & 0xf;
        all |= high | low;
    }
    all <= 0xf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_a_shell_are_read_back_by_it_and_do_nothing_else() {
        for word in [
            "",
            "plain",
            "two words",
            "it's",
            "X;touch${IFS}/tmp/x;Y=1",
            "$(id)`id`",
            "a\nb\tc\\'",
            "\u{1b}[31m\u{202e}ü",
        ] {
            let quoted = shell_word(word);
            assert_eq!(printable(&quoted), quoted, "{word:?}");
            let script = format!("printf %s {quoted}");
            let shell = std::process::Command::new("bash")
                .args(["-c", &script])
                .output();
            assert_eq!(shell.unwrap().stdout, word.as_bytes(), "{quoted}");
        }
    }

    #[test]
    fn hexadecimal_digits_survive_being_written_and_read_and_nothing_else_is_read() {
        let bytes: Vec<u8> = (0..=255).collect();
        let mut text = String::new();
        push_hex(&mut text, &bytes);
        let mut read = vec![0; 256];
        assert!(parse_hex(&text, &mut read));
        assert_eq!(read, bytes);
        for bad in ["", "0", "000", "0G", "0A", "+f", "ü"] {
            assert!(!parse_hex(bad, &mut [0]), "{bad:?}");
        }
    }

    #[test]
    fn nothing_that_a_terminal_obeys_is_printable() {
        assert_eq!(
            printable("//pkg:target \"ü\" 漢\\"),
            "//pkg:target \"ü\" 漢\\"
        );
        assert_eq!(printable("a\u{1b}[2Jb\r\n\tc"), "a\\u{1b}[2Jb\\r\\n\\tc");
        for c in (0..=0x10_ffff).filter_map(char::from_u32) {
            let shown = printable(c.encode_utf8(&mut [0; 4])).into_owned();
            let turns = matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}');
            if c.is_control() || turns {
                assert!(shown.is_ascii() && shown.starts_with('\\'), "{c:?}");
            }
        }
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(shorten("short"), "short");
        assert_eq!(shorten(&"ü".repeat(1000)).chars().count(), 141);
    }
}
