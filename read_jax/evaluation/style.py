"""The styles of the report's page."""

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --ink: #1d1f24; --soft: #5c626e;
  --line: #dfe1e6; --accent: #2457a6; --answer: #e63c28; --target: #00b6cf; --ignored: #969696; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171b; --card: #1e2127; --ink: #e7e9ee;
  --soft: #a2a9b6; --line: #343943; --accent: #7fb0f5; --target: #00e1ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.5rem 1.25rem 4rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
header p { margin: 0 0 .8rem; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .9rem; }
a { color: var(--accent); }
.note { color: var(--soft); font-size: .88rem; margin: .5rem 0 .8rem; max-width: 75ch; }
.interval { display: block; color: var(--soft); font-size: .78rem; white-space: nowrap; }
dl { margin: 0; } dd { margin: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: .8rem;
  margin-bottom: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; }
.card dt { color: var(--soft); font-size: .85rem; }
.card strong { display: block; font-size: 1.75rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card svg { display: block; margin: .35rem 0; }
.card small { color: var(--soft); display: block; line-height: 1.35; }
.small strong { font-size: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
.numbers { min-width: 60%; }
th, td { text-align: left; padding: .35rem .65rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; white-space: nowrap; }
.numbers td, .numbers thead th + th { text-align: right; white-space: nowrap; }
.words td, .words th { overflow-wrap: anywhere; white-space: normal; } .words th { min-width: 11rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; }
.charts figure { flex: 1 1 400px; margin: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: .8rem; }
figcaption { color: var(--soft); font-size: .85rem; }
details { margin-top: .8rem; } summary { cursor: pointer; color: var(--accent); font-size: .9rem; }
.chart { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
.bar { fill: var(--accent); } .line { fill: none; stroke: var(--accent); stroke-width: 2; }
.grid { stroke: var(--line); } .dot { fill: var(--accent); stroke: var(--card); stroke-width: 1; }
.whisker { stroke: var(--accent); stroke-width: 3; stroke-linecap: round; opacity: .45; }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem; }
.case { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden;
  padding-bottom: .7rem; font-size: .88rem; }
.case > p, .case > dl { margin: .5rem .9rem 0; overflow-wrap: anywhere; }
.case b { color: var(--soft); font-weight: 600; font-size: .78rem; margin-right: .3rem; }
.case dl { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.case dl div { display: flex; gap: .35rem; } .case dt { color: var(--soft); } .case dd { font-weight: 600; }
.case .where { color: var(--soft); font-size: .75rem; }
.case .gone { color: var(--soft); font-style: italic; padding-top: .4rem; }
.pictures { display: flex; background: var(--line); }
.pictures img { flex: 1 1 0; min-width: 0; height: 220px; object-fit: contain; }
.pictures img + img { border-left: 2px solid var(--card); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: 0 0 .8rem;
  font-size: .85rem; color: var(--soft); }
.legend i { display: inline-block; width: 1.1em; height: .8em; margin-right: .4em; border-radius: 2px; }
.answer { background: var(--answer); } .target { border: 3px solid var(--target); }
.ignored { border: 3px solid var(--ignored); }
@media print { nav { display: none; } .case { break-inside: avoid; } }
"""
