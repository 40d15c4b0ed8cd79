//! What `cargo lab check` and `cargo lab index` need to know of a Markdown file.

use std::collections::HashMap;

use pulldown_cmark::{CodeBlockKind, CowStr, Event, Options, Parser, Tag, TagEnd};

/// A file quoted by mdBook's `{{#include path:anchor}}`.
#[derive(Debug, PartialEq, Eq)]
pub struct Include<'a> {
    /// Counted from 1, like every line here.
    pub line: usize,
    /// Relative to the folder of the page.
    pub path: &'a str,
    pub anchor: Option<&'a str>,
}

/// The includes of a page, wherever they stand, in code as well.
pub fn includes(text: &str) -> Vec<Include<'_>> {
    text.match_indices("{{#include")
        .filter(|(start, _)| !text[..*start].ends_with('\\'))
        .filter_map(|(start, mark)| {
            let (quoted, _) = text[start + mark.len()..].split_once("}}")?;
            let quoted = quoted.trim();
            let (path, anchor) = match quoted.split_once(':') {
                Some((path, anchor)) => (path, Some(anchor)),
                None => (quoted, None),
            };
            Some(Include {
                line: line_of(text, start),
                path,
                anchor,
            })
        })
        .collect()
}

/// A fenced block of code.
#[derive(Debug, PartialEq, Eq)]
pub struct Fence {
    /// Of the opening fence.
    pub line: usize,
    /// What stands after the backticks, such as `rust,ignore`.
    pub info: String,
    pub text: String,
}

/// A link, the source of an image, or the `href` or `src` of an HTML tag.
#[derive(Debug, PartialEq, Eq)]
pub struct Link {
    pub line: usize,
    pub target: String,
}

/// A heading with the text that a reader sees.
#[derive(Debug, PartialEq, Eq)]
pub struct Heading {
    pub text: String,
    /// What a link to it has after `#`, on code hosts and in mdBook.
    pub id: String,
}

/// The parts of a Markdown file, each in the order of the text.
#[derive(Debug, Default)]
pub struct Document {
    pub fences: Vec<Fence>,
    pub headings: Vec<Heading>,
    pub links: Vec<Link>,
}

impl Document {
    /// Reads a file the way mdBook does.
    pub fn parse(text: &str) -> Self {
        let mut document = Self::default();
        let mut ids = HashMap::new();
        let mut heading: Option<String> = None;
        let mut in_fence = false;
        let options = Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH;
        for (event, range) in Parser::new_ext(text, options).into_offset_iter() {
            let line = || line_of(text, range.start);
            match event {
                Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(info))) => {
                    in_fence = true;
                    document.fences.push(Fence {
                        line: line(),
                        info: info.into_string(),
                        text: String::new(),
                    });
                }
                Event::End(TagEnd::CodeBlock) => in_fence = false,
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => {
                    let text = heading.take().unwrap_or_default();
                    let id = unique(&mut ids, heading_id(&text));
                    document.headings.push(Heading { text, id });
                }
                Event::Start(
                    Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. },
                ) => document.add_link(line(), &dest_url),
                Event::Html(html) | Event::InlineHtml(html) => {
                    for target in html_targets(&html) {
                        document.add_link(line(), &target.into());
                    }
                }
                Event::Text(piece) if in_fence => {
                    if let Some(fence) = document.fences.last_mut() {
                        fence.text.push_str(&piece);
                    }
                }
                Event::Text(piece) | Event::Code(piece) => {
                    if let Some(heading) = &mut heading {
                        heading.push_str(&piece);
                    }
                }
                _ => {}
            }
        }
        document
    }

    fn add_link(&mut self, line: usize, target: &CowStr<'_>) {
        self.links.push(Link {
            line,
            target: target.to_string(),
        });
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text[..offset].matches('\n').count() + 1
}

/// Lower case, blanks as `-`, and of the other signs only `-` and `_`.
fn heading_id(text: &str) -> String {
    text.trim()
        .to_lowercase()
        .chars()
        .filter_map(|c| match c {
            c if c.is_whitespace() => Some('-'),
            c if c.is_alphanumeric() || matches!(c, '-' | '_') => Some(c),
            _ => None,
        })
        .collect()
}

/// The second heading of a name gets `-1`, the third `-2`.
fn unique(seen: &mut HashMap<String, usize>, id: String) -> String {
    let count = seen.entry(id.clone()).or_insert(0);
    *count += 1;
    match *count {
        1 => id,
        more => format!("{id}-{}", more - 1),
    }
}

fn html_targets(html: &str) -> impl Iterator<Item = &str> {
    ["href=\"", "src=\"", "srcset=\""]
        .into_iter()
        .flat_map(|attribute| html.split(attribute).skip(1))
        .filter_map(|rest| rest.split('"').next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn includes_are_found_with_their_lines() {
        let text = "a\n{{#include ../x.rs:main}} and {{#include y.txt}}\n\
                    \\{{#include shown.rs}}\n";
        let found = includes(text);
        assert_eq!(
            found,
            [
                Include {
                    line: 2,
                    path: "../x.rs",
                    anchor: Some("main")
                },
                Include {
                    line: 2,
                    path: "y.txt",
                    anchor: None
                }
            ]
        );
    }

    #[test]
    fn a_file_is_taken_apart() {
        let document = Document::parse(
            "# One `two`: Three!\n\n[a](b.md#c) ![p](p.svg)\n\n```rust,ignore\n\
             [no](link.md)\n```\n\n## 队列 and more\n\n## 队列 and more\n\n\
             <img src=\"d.svg\">\n\n`[no](link.md)`\n",
        );
        let ids: Vec<_> = document.headings.iter().map(|h| h.id.as_str()).collect();
        assert_eq!(ids, ["one-two-three", "队列-and-more", "队列-and-more-1"]);
        let links: Vec<_> = document
            .links
            .iter()
            .map(|link| (link.line, link.target.as_str()))
            .collect();
        assert_eq!(links, [(3, "b.md#c"), (3, "p.svg"), (13, "d.svg")]);
        assert_eq!(
            document.fences,
            [Fence {
                line: 5,
                info: "rust,ignore".to_owned(),
                text: "[no](link.md)\n".to_owned()
            }]
        );
    }
}
