"""One self-contained HTML file about a run, or several side by side: `python -m train.report RUN`.

`record` reads what a run's folder holds, `page` makes the file; between them, one module for each part of the page.
"""
