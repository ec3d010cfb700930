//! Rust source as text: code without comments and strings, and the paths in it.

use std::collections::BTreeSet;

/// The text with comments and the insides of strings and characters replaced by blanks, so that what is
/// left is code. Lines stay where they are.
pub fn code_of(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut code = String::with_capacity(text.len());
    let mut i = 0;
    // Copies up to `end` as blanks, keeping line ends.
    let blank = |code: &mut String, from: usize, end: usize| {
        code.extend(
            chars[from..end]
                .iter()
                .map(|&c| if c == '\n' { '\n' } else { ' ' }),
        );
    };
    while i < chars.len() {
        let next = chars.get(i + 1).copied();
        let before = i.checked_sub(1).map(|at| chars[at]);
        let end = match chars[i] {
            '/' if next == Some('/') => find(&chars, i, |rest| rest[0] == '\n'),
            '/' if next == Some('*') => end_of_block_comment(&chars, i),
            '"' => end_of_string(&chars, i + 1),
            'r' if !before.is_some_and(is_word) || before == Some('b') => {
                match end_of_raw_string(&chars, i) {
                    Some(end) => end,
                    None => i,
                }
            }
            '\'' if next == Some('\\') => find(&chars, i + 3, |rest| rest[0] == '\'') + 1,
            '\'' if chars.get(i + 2) == Some(&'\'') => i + 3,
            _ => i,
        };
        let end = end.min(chars.len());
        if end > i {
            blank(&mut code, i, end);
            i = end;
        } else {
            code.push(chars[i]);
            i += 1;
        }
    }
    code
}

/// The first place from `from` on where `found` says so, or the end.
pub fn find(chars: &[char], from: usize, found: impl Fn(&[char]) -> bool) -> usize {
    (from..chars.len())
        .find(|&at| found(&chars[at..]))
        .unwrap_or(chars.len())
}

fn end_of_block_comment(chars: &[char], start: usize) -> usize {
    let mut depth = 0;
    let mut at = start;
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn end_of_string(chars: &[char], mut at: usize) -> usize {
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

fn end_of_raw_string(chars: &[char], start: usize) -> Option<usize> {
    let hashes = chars[start + 1..].iter().take_while(|&&c| c == '#').count();
    if chars.get(start + 1 + hashes) != Some(&'"') {
        return None;
    }
    let close: Vec<char> = std::iter::once('"')
        .chain(std::iter::repeat_n('#', hashes))
        .collect();
    Some(find(chars, start + 2 + hashes, |rest| rest.starts_with(&close)) + close.len())
}

pub fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where `path` (one or more words joined by `::`) stands in `code` as words of its own.
pub fn mentions(code: &str, path: &str) -> Vec<usize> {
    code.match_indices(path)
        .map(|(at, _)| at)
        .filter(|&at| {
            let before = code[..at].chars().next_back();
            let after = code[at + path.len()..].chars().next();
            !before.is_some_and(is_word) && !after.is_some_and(is_word)
        })
        .collect()
}

/// What follows `root::` anywhere in `code`, within groups too: `root::{a::b, c}` gives a and c.
pub fn members(code: &str, root: &str) -> BTreeSet<String> {
    let mut members = BTreeSet::new();
    for at in mentions(code, root) {
        let Some(rest) = code[at + root.len()..].trim_start().strip_prefix("::") else {
            continue;
        };
        let rest = rest.trim_start();
        let Some(group) = rest.strip_prefix('{') else {
            members.insert(first_word(rest));
            continue;
        };
        let mut depth = 0;
        let mut item_begins = true;
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => item_begins = true,
                c if is_word(c) && item_begins => {
                    members.insert(first_word(&group[at..]));
                    item_begins = false;
                }
                _ => {}
            }
        }
    }
    members
}

pub fn first_word(text: &str) -> String {
    text.chars().take_while(|&c| is_word(c)).collect()
}

pub fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

#[test]
fn code_is_told_from_comments_and_strings() {
    let code = code_of(concat!(
        "a /* x /* y */ z */ b // unsafe\n",
        "\"un\\\"safe\" c r#\"unsafe \" \"# d '\\'' e '\"' f<'g>(br\"unsafe\") number\n",
    ));
    assert!(!code.contains("safe"), "{code:?}");
    let words: Vec<&str> = code.split_whitespace().collect();
    assert_eq!(words, ["a", "b", "c", "d", "e", "f<'g>(b", ")", "number"]);
    assert_eq!(code.lines().count(), 2);
}

#[test]
fn members_are_found_in_groups() {
    let code = "use std::{fmt, collections::{BTreeMap, fs}, io::{self}}; std :: net::x(); mystd::os; std::mem";
    let found: Vec<String> = members(code, "std").into_iter().collect();
    assert_eq!(found, ["collections", "fmt", "io", "mem", "net"]);
}
