//! Line charts as SVG text, drawn by plotters. Its SVG back end needs no font or image library.

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::{Error, Result};

/// Width and height of a chart, pixels.
const SIZE: (u32, u32) = (640, 360);

/// Colours of the lines, a palette for colour-blind readers (Okabe and Ito, 2008).
const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
];

/// A chart.
#[derive(Debug, Clone, Default)]
pub struct Chart {
    /// Title above the chart.
    pub title: String,
    /// Label of the x axis.
    pub x: String,
    /// Label of the y axis.
    pub y: String,
    /// The x axis is logarithmic.
    pub log_x: bool,
    /// The y axis starts at the lowest point, not at zero.
    pub tight: bool,
    /// Draw points without lines between them.
    pub dots: bool,
    /// Name and points of each line.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

impl Chart {
    /// Draws the chart as SVG; an empty chart without points. Errors: plotters fails.
    pub fn svg(&self) -> Result<String> {
        let mut text = String::new();
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        self.draw(&area).map_err(|e| Error::internal(format!("chart {:?}: {e}", self.title)))?;
        drop(area);
        Ok(text)
    }

    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        let place = |x: f64| if self.log_x { x.max(1e-9).log10() } else { x };
        let points = || self.lines.iter().flat_map(|(_, points)| points);
        let (low, high) =
            points().fold((f64::MAX, f64::MIN), |(low, high), p| (low.min(place(p.0)), high.max(place(p.0))));
        let top = points().fold(0.0f64, |top, p| top.max(p.1));
        let bottom = if self.tight { points().fold(top, |bottom, p| bottom.min(p.1)) } else { 0.0 };
        if points().next().is_none() {
            return Ok(());
        }
        let low = if self.log_x || self.dots { low } else { low.min(0.0) };
        let span = if high > low { high - low } else { 1.0 };
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, ("sans-serif", 17))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(60)
            .build_cartesian_2d(low..low + span * 1.03, bottom..(bottom + (top - bottom) * 1.1).max(bottom + 1e-9))?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc(&self.x)
            .y_desc(&self.y)
            .x_label_formatter(&|x| number(if self.log_x { 10f64.powf(*x) } else { *x }))
            .y_label_formatter(&|y| if self.tight { format!("{y:.2}") } else { number(*y) })
            .draw()?;
        for (i, (name, points)) in self.lines.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            let placed = || points.iter().map(|&(x, y)| (place(x), y));
            // Many large marks would hide the line.
            let marks = if self.dots || points.len() > 40 { 2 } else { 4 };
            if !self.dots {
                chart.draw_series(LineSeries::new(placed(), color.stroke_width(2)))?;
            }
            chart
                .draw_series(placed().map(|point| Circle::new(point, marks, color.filled())))?
                .label(name)
                .legend(move |(x, y)| Circle::new((x + 8, y), 4, color.filled()));
        }
        if self.lines.len() > 1 {
            chart
                .configure_series_labels()
                // Throughput and latency rise, losses fall: the legend is where the lines are not.
                .position(if self.tight { SeriesLabelPosition::UpperRight } else { SeriesLabelPosition::LowerRight })
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK.mix(0.2))
                .draw()?;
        }
        area.present()
    }
}

/// Formats an axis value with few digits.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if !(1e-9..10.0).contains(&v) => 0,
        v if v >= 1.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}
