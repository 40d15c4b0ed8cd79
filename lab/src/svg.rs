//! The picture of a terminal: a recorded transcript as an SVG.

use anstyle::{Color, RgbColor};
use anstyle_svg::{Palette, Term};

/// Longer lines are broken: wider than this, a README shows the picture so small
/// that nobody can read it.
const COLUMNS: usize = 90;

/// Between the white and the black page of a code host, so that the picture has
/// an edge on both.
const BACKGROUND: Color = rgb(0x16, 0x1b, 0x22);
const FOREGROUND: Color = rgb(0xe6, 0xed, 0xf3);

/// The sixteen colours of a terminal, light enough for [`BACKGROUND`].
const PALETTE: Palette = Palette([
    RgbColor(0x48, 0x4f, 0x58),
    RgbColor(0xff, 0x7b, 0x72),
    RgbColor(0x3f, 0xb9, 0x50),
    RgbColor(0xd2, 0x99, 0x22),
    RgbColor(0x58, 0xa6, 0xff),
    RgbColor(0xbc, 0x8c, 0xff),
    RgbColor(0x39, 0xc5, 0xcf),
    RgbColor(0xb1, 0xba, 0xc4),
    RgbColor(0x8b, 0x94, 0x9e),
    RgbColor(0xff, 0xa1, 0x98),
    RgbColor(0x56, 0xd3, 0x64),
    RgbColor(0xe3, 0xb3, 0x41),
    RgbColor(0x79, 0xc0, 0xff),
    RgbColor(0xd2, 0xa8, 0xff),
    RgbColor(0x56, 0xd4, 0xdd),
    RgbColor(0xf0, 0xf6, 0xfc),
]);

const fn rgb(red: u8, green: u8, blue: u8) -> Color {
    Color::Rgb(RgbColor(red, green, blue))
}

/// Draws a transcript, which may contain ANSI colours.
pub fn render(transcript: &str) -> String {
    let lines: Vec<String> = transcript.trim_end().lines().map(wrapped).collect();
    Term::new()
        .palette(PALETTE)
        .fg_color(FOREGROUND)
        .bg_color(BACKGROUND)
        .render_svg(&lines.join("\n"))
}

/// Breaks a line after [`COLUMNS`] visible characters. Escape sequences take no
/// room, and a colour goes on in the next line by itself.
fn wrapped(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    let mut column = 0;
    let mut in_escape = false;
    for c in line.chars() {
        if c == '\u{1b}' {
            in_escape = true;
        } else if !in_escape {
            if column == COLUMNS {
                text.push('\n');
                column = 0;
            }
            column += 1;
        } else if c.is_ascii_alphabetic() {
            in_escape = false;
        }
        text.push(c);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_and_marks_survive() {
        let svg = render("$ cargo lab demo\n\u{1b}[32m✓\u{1b}[0m a <b> & c\n");
        assert!(svg.starts_with("<svg "), "{svg}");
        assert!(svg.contains("#3FB950"), "green is ours: {svg}");
        assert!(svg.contains("a &lt;b&gt; &amp; c"), "{svg}");
        assert!(!svg.contains('\u{1b}'), "{svg}");
    }

    #[test]
    fn long_lines_are_broken_without_counting_colours() {
        let long = format!("\u{1b}[1m{}\u{1b}[0m", "x".repeat(COLUMNS));
        assert_eq!(wrapped(&long), long);
        let longer = format!("{long}yz");
        assert_eq!(wrapped(&longer), format!("{long}\nyz"));
    }
}
