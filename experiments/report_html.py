"""A report as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.report_conclusion import lift_text, p_text
from experiments.report_model import Report
from experiments.report_plots import forest, series_plot, traffic_plot
from experiments.report_text import interval_text, number_text, rule_text


def environment() -> Environment:
    """Where the templates of reports are found; everything is escaped."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(lift=lift_text, p=p_text, number=number_text)
    return found


def as_html(report: Report) -> str:
    """The page: conclusion, checks, all effects at a glance, then metric by metric. Names are escaped, SVG is ours."""
    return (
        environment()
        .get_template("report.html")
        .render(
            report=report,
            rule=rule_text(report.analysis),
            total=sum(report.counts.units.values()),
            interval=interval_text,
            forest=Markup(forest(report)),
            traffic=Markup(traffic_plot(report)),
            series={
                (result.metric.name, comparison.arm): Markup(series_plot(result, comparison.arm))
                for result in report.metrics
                for comparison in result.comparisons
            },
        )
    )
