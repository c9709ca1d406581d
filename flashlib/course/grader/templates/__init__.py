"""HTML of reports, as Jinja2 templates."""
