"""The page's style sheet: system fonts, light and dark, paper. Contrast of text is at least 4.5 to 1 in both."""

CSS = """
:root {
  color-scheme: light dark;
  --bg: #f7f7f5; --surface: #ffffff; --ink: #1b1d21; --muted: #585e68; --rule: #e1e2de; --soft: #f0f1ee;
  --accent: #1a5fb4; --s0: #1a5fb4; --s1: #b34d00; --s2: #0b7a6a;
  --good: #146c37; --bad: #b3261e; --bad-soft: #fdeceb; --warn: #7a5200; --warn-soft: #fdf3dc;
  --bar: #b9bec8; --shade: #8db8ee; --edge: rgb(0 0 0 / 0.16);
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #121418; --surface: #1a1d23; --ink: #e9eaed; --muted: #a5acb8; --rule: #31353e; --soft: #22262d;
    --accent: #82b6f7; --s0: #82b6f7; --s1: #f2a663; --s2: #5fcdb8;
    --good: #7bd69a; --bad: #ff9d94; --bad-soft: #3a1f1e; --warn: #f0c873; --warn-soft: #35290f;
    --bar: #565d6a; --shade: #2c5c99; --edge: rgb(0 0 0 / 0.5);
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--bg); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
}
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
main { padding-bottom: 16px; }
footer { color: var(--muted); font-size: 14px; padding-bottom: 48px; }
h1, h2, h3 { line-height: 1.2; text-wrap: balance; overflow-wrap: anywhere; }
h1 { font-size: clamp(28px, 4.5vw, 40px); letter-spacing: -0.02em; margin: 4px 0 12px; font-weight: 680; }
h2 { font-size: 21px; letter-spacing: -0.01em; margin: 44px 0 14px; scroll-margin-top: 12px; }
h3 { font-size: 15px; margin: 0 0 10px; color: var(--muted); font-weight: 600; }
p { margin: 0 0 12px; max-width: 72ch; overflow-wrap: anywhere; }
a { color: var(--accent); text-underline-offset: 3px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
code, pre {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 0.875em;
}
.eyebrow { margin: 0; color: var(--muted); font-size: 14px; font-weight: 600; }
.eyebrow b { color: var(--accent); font-weight: 700; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 15px; margin: 0; padding: 0; }
.facts div { min-width: 0; }
.facts dt { display: inline; color: var(--muted); }
.facts dt::after { content: "\\00a0"; }
.facts dd { display: inline; margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.muted { color: var(--muted); }
.card, .banner {
  background: var(--surface); border: 1px solid var(--rule); border-radius: 12px; padding: 20px; min-width: 0;
}
.card > :last-child { margin-bottom: 0; }
.banner { border-width: 1px 1px 1px 6px; margin: 20px 0 0; }
.banner h2 { margin: 0 0 6px; font-size: 18px; }
.banner p { margin: 0; white-space: pre-wrap; }
.banner p + p { margin-top: 8px; }
.banner.failed { background: var(--bad-soft); border-color: var(--bad); }
.banner.failed h2 { color: var(--bad); }
.banner.unfinished { background: var(--warn-soft); border-color: var(--warn); }
.banner.unfinished h2 { color: var(--warn); }
nav { margin-top: 22px; border-top: 1px solid var(--rule); padding-top: 10px; }
nav ul {
  list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 20px; font-size: 14px;
}
nav a { text-decoration: none; display: inline-block; padding: 3px 0; }
nav a:hover { text-decoration: underline; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
.top { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 860px) { .top.two { grid-template-columns: minmax(0, 1.15fr) minmax(0, 1fr); } }
.big {
  font-size: clamp(30px, 4.6vw, 46px); line-height: 1.1; font-weight: 680; letter-spacing: -0.025em;
  margin: 0 0 8px;
}
.big .was { color: var(--muted); font-weight: 500; }
.big .arrow { color: var(--muted); font-weight: 400; padding: 0 0.12em; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(2, minmax(0, 1fr)); margin: 0; }
.tiles.wide { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tiles div {
  background: var(--surface); border: 1px solid var(--rule); border-radius: 12px; padding: 14px 16px;
}
.tiles div:first-child:nth-last-child(odd) { grid-column: 1 / -1; }
.tiles.wide div:first-child:nth-last-child(odd) { grid-column: auto; }
.tiles dt { color: var(--muted); font-size: 14px; line-height: 1.3; }
.tiles dd { margin: 0; }
.tiles .value {
  font-size: 22px; font-weight: 650; letter-spacing: -0.01em; margin-top: 2px; line-height: 1.3;
}
.tiles .note { color: var(--muted); font-size: 13px; line-height: 1.35; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: 14px; padding: 0 0 10px; caption-side: top; }
th, td { text-align: left; padding: 8px 12px; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child > * { border-bottom: 0; }
thead th {
  color: var(--muted); font-weight: 600; font-size: 13px; vertical-align: bottom;
  border-bottom-color: var(--bar);
}
tbody th { font-weight: 500; }
td.num, th.num { text-align: right; white-space: nowrap; }
thead th.num { white-space: normal; }
td.strong { font-weight: 700; }
td.long { overflow-wrap: anywhere; min-width: 180px; }
.scroll td.long { max-width: 260px; }
.scroll {
  overflow-x: auto; max-width: 100%; container-type: inline-size;
  /* Shadows at the edges where there is more to scroll to. */
  background:
    linear-gradient(to right, var(--surface) 40%, transparent) 0 0 / 48px 100% local no-repeat,
    linear-gradient(to left, var(--surface) 40%, transparent) 100% 0 / 48px 100% local no-repeat,
    linear-gradient(to right, var(--edge), transparent) 0 0 / 14px 100% scroll no-repeat,
    linear-gradient(to left, var(--edge), transparent) 100% 0 / 14px 100% scroll no-repeat;
}
.scroll th, .scroll td { max-width: 360px; overflow-wrap: anywhere; }
.scroll td.num { overflow-wrap: normal; }
caption span { display: block; position: sticky; left: 0; max-width: 100cqw; }
.scroll > table.short { width: auto; min-width: min(100%, 420px); }
.scroll > table { min-width: max-content; }
.bars { table-layout: fixed; }
.bars th, .bars td { border: 0; padding: 5px 0; vertical-align: middle; }
.bars th { font-size: 14px; padding-right: 14px; line-height: 1.25; width: 36%; overflow-wrap: anywhere; }
.bars td.num { padding-left: 8px; width: 68px; }
.bars .track { display: block; height: 14px; border-radius: 3px; background: var(--soft); }
.bars .fill {
  display: block; height: 100%; width: var(--w); min-width: 2px; border-radius: 3px; background: var(--bar);
}
.bars .after .fill { background: var(--accent); }
.bars .after > * { font-weight: 700; }
figure { margin: 0; }
figcaption { color: var(--muted); font-size: 14px; margin-top: 8px; overflow-wrap: anywhere; }
.chart { display: block; width: 100%; height: auto; max-width: 620px; overflow: visible; }
.chart text {
  font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--muted);
  font-variant-numeric: tabular-nums;
}
.chart .name { fill: var(--ink); font-weight: 600; }
.chart .rule { stroke: var(--rule); stroke-width: 1; }
.chart .axis { stroke: var(--muted); stroke-width: 1; }
.chart .line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .dot { fill: var(--surface); stroke: var(--c); stroke-width: 2; }
.chart .faint { opacity: 0; }
.chart .dot:hover { fill: var(--c); opacity: 1; }
.chart .dense .line { stroke-width: 1.25; opacity: 0.8; }
.chart .dashed .line { stroke-dasharray: 6 5; }
.chart .s0 { --c: var(--s0); } .chart .s1 { --c: var(--s1); } .chart .s2 { --c: var(--s2); }
.confusion { width: auto; border-collapse: separate; border-spacing: 3px; }
.confusion caption { color: var(--ink); font-weight: 600; }
.confusion th, .confusion td { border: 0; padding: 8px 10px; vertical-align: middle; }
.confusion thead th, .confusion thead td { padding: 2px 6px; }
.confusion thead th { font-size: 13px; text-align: center; max-width: 130px; overflow-wrap: anywhere; }
.confusion .axis { color: var(--muted); font-size: 13px; font-weight: 500; }
.confusion tbody th { font-size: 13px; text-align: right; max-width: 150px; overflow-wrap: anywhere; }
.confusion td { text-align: center; min-width: 58px; }
.confusion td.cell {
  border-radius: 6px;
  background: color-mix(in srgb, var(--shade) calc(var(--a) * 100%), var(--soft));
}
.confusion td.hit { box-shadow: inset 0 0 0 2px var(--accent); font-weight: 700; }
.confusion td.recall { color: var(--muted); font-size: 13px; white-space: nowrap; }
details {
  background: var(--surface); border: 1px solid var(--rule); border-radius: 12px; margin-top: 12px;
  min-width: 0;
}
summary { cursor: pointer; padding: 12px 20px; font-weight: 600; }
summary:hover { color: var(--accent); }
details > .inside { padding: 4px 20px 20px; }
pre {
  margin: 0; padding: 14px 16px; background: var(--soft); border-radius: 8px; overflow-x: auto;
  line-height: 1.5; tab-size: 2;
}
pre.command {
  margin-bottom: 12px;
  border: 1px solid var(--rule); background: var(--surface); white-space: pre-wrap; overflow-wrap: anywhere;
}
.examples { list-style: none; margin: 0; padding: 0; display: grid; gap: 12px; }
.example { display: grid; gap: 14px 28px; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 860px) { .example { grid-template-columns: minmax(0, 1.25fr) minmax(0, 1fr); } }
.user { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin: 0; }
.prompt { max-height: 15em; overflow-y: auto; }
.answers {
  margin: 0; display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 8px 16px; align-content: start;
}
.answers dt { color: var(--muted); font-size: 14px; line-height: 1.7; }
.answers dd { margin: 0; max-height: 12em; overflow-y: auto; }
.mark { display: inline-block; font-size: 13px; font-weight: 650; white-space: nowrap; margin-right: 8px; }
.mark.right { color: var(--good); } .mark.wrong { color: var(--bad); }
@media (max-width: 600px) {
  header, main, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 24px; }
  .card { padding: 16px; }
  .chart text { font-size: 15px; }
  .confusion { border-spacing: 2px; }
  .confusion th, .confusion td { padding: 8px 3px; }
  .confusion td { min-width: 44px; }
  .confusion thead th, .confusion thead td { padding: 2px; font-size: 12px; }
  .facts { gap: 4px 20px; }
  summary { padding: 12px 16px; }
  details > .inside { padding: 4px 16px 16px; }
}
@media print {
  :root {
    color-scheme: light;
    --bg: #fff; --surface: #fff; --ink: #000; --muted: #444; --rule: #ccc; --soft: #f2f2f2; --accent: #1a4f94;
    --s0: #1a4f94; --s1: #b34d00; --s2: #0b6a5c; --good: #146c37; --bad: #a3211a; --bad-soft: #fff; --warn: #6b4800;
    --warn-soft: #fff; --bar: #aaa; --shade: #a9c8f0;
  }
  body { font-size: 10pt; }
  h2 { margin-top: 22pt; }
  table { font-size: 9pt; }
  .grid, .top.two { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
  .example { grid-template-columns: minmax(0, 1.25fr) minmax(0, 1fr); }
  header, main, footer { max-width: none; padding-left: 0; padding-right: 0; }
  nav { display: none; }
  .scroll, pre { overflow: visible; }
  .scroll { background: none; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .scroll > table { min-width: 0; }
  th, td { padding: 5px 6px; }
  td.long { min-width: 0; }
  .prompt, .answers dd { max-height: none; overflow: visible; }
  .card, .tiles div, .banner, tr, figure, p, .grid { break-inside: avoid; }
  .scroll thead th, .confusion tbody th { overflow-wrap: break-word; }
  .confusion { border-spacing: 2px; font-size: 8.5pt; }
  .confusion thead th, .confusion tbody th, .confusion td.recall { font-size: 8.5pt; }
  .confusion th, .confusion td { min-width: 0; padding: 5px 3px; }
  h2, h3, caption, section > p { break-after: avoid; }
  .fill, .track, .cell { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
