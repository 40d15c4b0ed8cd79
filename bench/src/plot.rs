//! The results as a picture: how many times as good as the tool, for each row of
//! the table.

use anyhow::{Result, anyhow};
use plotters::{
    prelude::{
        ChartBuilder, Circle, EmptyElement, IntoDrawingArea as _, PathElement,
        Rectangle, SVGBackend, Text,
    },
    style::{Color as _, IntoFont as _, RGBColor, ShapeStyle, WHITE, text_anchor},
};

use crate::report::{Report, Row};

const WIDTH: u32 = 900;
const ROW: u32 = 44;
const TOP: u32 = 50;
const BOTTOM: u32 = 50;
/// For the names of the rows.
const LEFT: i32 = 330;

const AHEAD: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const BEHIND: RGBColor = RGBColor(0xd6, 0x7a, 0x1e);
const DARK: RGBColor = RGBColor(0x24, 0x29, 0x2f);

pub fn render(report: &Report) -> Result<String> {
    let rows: Vec<Row<'_>> = report.rows().collect();
    let mut svg = String::new();
    draw(report, &rows, &mut svg).map_err(|error| anyhow!("{error}"))?;
    Ok(svg + "\n")
}

fn draw(
    report: &Report,
    rows: &[Row<'_>],
    svg: &mut String,
) -> Result<(), Box<dyn std::error::Error>> {
    let count = u32::try_from(rows.len())?;
    let height = TOP + count * ROW + BOTTOM;
    let area = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let quick = if report.quick {
        " (quick run: no figures)"
    } else {
        ""
    };
    let title = format!(
        "{}: times as good as the broker's own tool{quick}",
        report.versions.client
    );
    let font = |size: i32| ("sans-serif", size).into_font().color(&DARK);
    area.draw(&Text::new(title, (16, 16), font(18)))?;

    let right = rows
        .iter()
        .map(|row| row.ratio.max.max(row.case.target.unwrap_or(0.0)));
    let right = right.fold(1.2, f64::max) * 1.15;
    let mut chart = ChartBuilder::on(&area)
        .margin_top(TOP)
        .margin_right(20)
        .x_label_area_size(BOTTOM)
        .margin_left(LEFT)
        .build_cartesian_2d(0.0..right, 0.0..f64::from(count))?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_labels(10)
        .x_label_formatter(&|ratio| format!("{ratio:.1}"))
        .x_desc("bar: median; line: smallest to largest; circle: target")
        .label_style(font(13))
        .draw()?;

    let style = |color: RGBColor| ShapeStyle::from(color);
    for (index, row) in rows.iter().enumerate() {
        // The first on top.
        let middle = f64::from(count) - f64::from(u32::try_from(index)?) - 0.5;
        let color = if row.ratio.median >= 1.0 {
            AHEAD
        } else {
            BEHIND
        };
        let bar = [(0.0, middle - 0.28), (row.ratio.median, middle + 0.28)];
        let ends = vec![(row.ratio.min, middle), (row.ratio.max, middle)];
        let name = format!("{}, {}", row.case.title.en, row.measure.name());
        let anchor = text_anchor::Pos::new(
            text_anchor::HPos::Right,
            text_anchor::VPos::Center,
        );
        let label = Text::new(name, (-10, 0), font(14).pos(anchor));
        let value = format!("{:.2}", row.ratio.median);
        let anchor = text_anchor::Pos::new(
            text_anchor::HPos::Left,
            text_anchor::VPos::Center,
        );
        let value = Text::new(value, (12, 0), font(13).pos(anchor));
        chart.draw_series([Rectangle::new(bar, style(color).filled())])?;
        chart.draw_series([PathElement::new(ends, style(DARK).stroke_width(2))])?;
        let target = row.case.target;
        chart.draw_series(
            target.map(|target| Circle::new((target, middle), 5, style(DARK))),
        )?;
        chart.draw_series([EmptyElement::at((0.0, middle)) + label])?;
        // Right of all that is drawn in this row.
        let end = row.ratio.max.max(row.case.target.unwrap_or(0.0));
        chart.draw_series([EmptyElement::at((end, middle)) + value])?;
    }
    let top = f64::from(count);
    let even = vec![(1.0, 0.0), (1.0, top)];
    chart.draw_series([PathElement::new(even, DARK.stroke_width(1))])?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;

    #[test]
    fn each_row_has_its_name_and_its_bar() -> Result<()> {
        let svg = render(&example())?;
        assert!(svg.starts_with("<svg "), "{svg}");
        for text in ["publish, msg/s", "request, p50, µs", "request, p99, µs"] {
            assert!(svg.contains(text), "{text} is not in {svg}");
        }
        assert!(svg.contains("async-nats 0.51.0"));
        assert!(!svg.contains("absent"), "a case without samples has no bar");
        Ok(())
    }

    #[test]
    fn the_same_results_give_the_same_bytes() -> Result<()> {
        assert_eq!(render(&example())?, render(&example())?);
        Ok(())
    }
}
