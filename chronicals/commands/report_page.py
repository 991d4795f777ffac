"""The page of `chronicals report`, a Jinja template: self-contained, light or dark as the reader's system is."""

from __future__ import annotations

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --paper: #fbfaf8; --card: #ffffff; --ink: #1d1f24; --soft: #6b6f78; --rule: #e4e2dd; --grid: #eeece8;
        --train: #2f6fde; --eval: #d9480f; --good: #2b8a3e; --warn: #b35c00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14161a; --card: #1c1f25; --ink: #e8e9ec; --soft: #989da8; --rule: #30343c; --grid: #292d34;
          --train: #74a5ff; --eval: #ff9d5c; --good: #69db7c; --warn: #ffb454; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 0 0 8px; font-weight: 600; }
.soft { color: var(--soft); }
header p { margin: 0; overflow-wrap: anywhere; }
.status { font-weight: 600; color: var(--good); } .status.cut { color: var(--warn); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(max(210px, min(300px, 46%)), 1fr));
  gap: 12px; margin: 28px 0 12px; }
.card, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.card { padding: 14px 16px; } .card .soft { font-size: 13px; }
.card b { display: block; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; }
figure { margin: 0; padding: 16px 16px 8px; } figure.wide { grid-column: 1 / -1; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: 13px; color: var(--soft); padding-bottom: 6px; }
.key { display: inline-block; width: 18px; height: 3px; border-radius: 2px; vertical-align: middle;
       margin: 0 5px 2px 10px; }
details { margin-top: 12px; padding: 12px 16px; background: var(--card); border: 1px solid var(--rule);
          border-radius: 10px; }
summary { cursor: pointer; font-weight: 600; font-size: 15px; }
pre { overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; margin: 12px 0 4px; }
table { border-collapse: collapse; margin: 12px 0 4px; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 28px 3px 0; vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 400; color: var(--soft); white-space: nowrap; }
@media (max-width: 760px) { .figures { grid-template-columns: 1fr; } main { padding: 24px 14px 48px; } }
@media print { details { break-inside: avoid; } body { background: #fff; } }
</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
<p><span class="status{{ '' if finished else ' cut' }}">{{ status }}</span></p>
</header>
<section class="cards" aria-label="Summary">
{%- for card in cards %}
<div class="card"><span class="soft">{{ card.name }}</span>
<b>{{ card.value }}</b><span class="soft">{{ card.note }}</span></div>
{%- endfor %}
</section>
<section class="figures" aria-label="Curves">
{%- for figure in figures %}
<figure{% if figure.wide %} class="wide"{% endif %}>
<h2>{{ figure.title }}</h2>
<figcaption>{{ figure.caption }}
{%- for label, colour in figure.keys -%}
<span class="key" style="background: var({{ colour }})"></span>{{ label }}
{%- endfor %}
</figcaption>
{{ figure.svg | safe }}
</figure>
{%- endfor %}
</section>
{%- for name, rows in tables %}
<details{% if loop.first %} open{% endif %}><summary>{{ name }}</summary>
<table>{% for row in rows %}<tr><th>{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></details>
{%- endfor %}
<details><summary>Configuration, as run</summary><pre>{{ config }}</pre></details>
</main>
</body>
</html>
"""
