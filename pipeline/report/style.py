"""The looks of a report: two palettes, and what changes on paper. Series colours are told apart by the colour-blind too."""

_LIGHT = """--page:#fff;--card:#f5f6f8;--text:#1b1f24;--faint:#59636e;--line:#d8dde3;--link:#0b5cad;
--good:#1a7f37;--note:#59636e;--look:#9a6700;--problem:#c4281c;
--s0:#0072b2;--s1:#e69f00;--s2:#009e73;--s3:#cc79a7;"""
_DARK = """--page:#14171b;--card:#1e2329;--text:#e4e8ec;--faint:#9aa5b1;--line:#363d46;--link:#78b7f5;
--good:#4cc36a;--note:#9aa5b1;--look:#e0ab3d;--problem:#ff7b6e;
--s0:#56a8e0;--s1:#e8ac2c;--s2:#2bbd90;--s3:#d795b8;"""

STYLE = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
@media print{{:root{{{_LIGHT}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:68rem;padding:1.5rem 1.25rem 4rem;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif;overflow-wrap:anywhere}}
h1{{font-size:1.6rem;line-height:1.25;margin:0}}
h2{{font-size:1.2rem;margin:2.5rem 0 .75rem;padding-bottom:.3rem;border-bottom:1px solid var(--line)}}
h3{{font-size:.9rem;margin:.75rem 0 .35rem;unicode-bidi:isolate}}
p{{margin:.4rem 0;max-width:52rem}}
.faint,caption,figcaption{{color:var(--faint)}}
.faint{{font-size:.88rem}}
nav{{display:flex;flex-wrap:wrap;gap:.25rem 1rem;margin:.75rem 0 0;font-size:.9rem}}
a{{color:var(--link)}}
.findings{{list-style:none;margin:0;padding:0}}
.findings li{{background:var(--card);border-left:4px solid var(--note);border-radius:3px;margin:.4rem 0;padding:.45rem .75rem}}
.findings li{{display:grid;grid-template-columns:5rem 1fr}}
.findings .level{{font-weight:600;color:var(--note)}}
.findings .good{{border-color:var(--good)}}.findings .good .level{{color:var(--good)}}
.findings .look{{border-color:var(--look)}}.findings .look .level{{color:var(--look)}}
.findings .problem{{border-color:var(--problem)}}.findings .problem .level{{color:var(--problem)}}
.figures{{display:flex;flex-wrap:wrap;gap:.6rem;margin:.75rem 0}}
.figure{{display:flex;flex-direction:column;background:var(--card);border-radius:4px;padding:.5rem .9rem;min-width:7rem}}
.figure dd{{margin:0;font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums}}
.figure dt{{color:var(--faint);font-size:.82rem}}
.wide{{display:inline-block;vertical-align:top;max-width:100%;overflow-x:auto;margin:.75rem 2.5rem .75rem 0}}
.wide.chart{{display:block;margin-right:0}}
table{{border-collapse:collapse;font-size:.9rem;overflow-wrap:break-word}}
caption{{text-align:left;padding-bottom:.25rem;font-size:.88rem}}
thead th{{text-align:left;font-weight:600;border-bottom:1px solid var(--line);padding:.25rem .9rem .25rem 0;white-space:nowrap}}
tbody td{{border-bottom:1px solid var(--line);padding:.25rem .9rem .25rem 0;vertical-align:top;unicode-bidi:isolate}}
.number,thead th.number{{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}}
.chart{{margin:.75rem 0}}
.bars{{width:100%;max-width:56rem}}
.bars thead th{{border:0;padding:.1rem 0 .3rem .9rem;font-size:.82rem;font-weight:400;color:var(--faint)}}
.bars thead i{{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.3rem;vertical-align:-.05rem}}
.bars tbody th{{width:1%;font-weight:400;text-align:right;padding:.1rem .7rem .1rem 0;unicode-bidi:isolate}}
.bars th span{{display:block;max-width:15rem;overflow:hidden;white-space:nowrap;text-overflow:ellipsis}}
.bars td{{border:0;padding:.1rem 0;vertical-align:middle}}
.bars .number{{width:1%;padding-left:.9rem}}
.bars .bar{{min-width:8rem}}
.bar svg{{display:block;width:100%;height:.85rem}}
.histogram{{display:block;width:100%;max-width:52rem;height:auto}}
.histogram text{{fill:var(--faint);font-size:12px}}
.histogram line{{stroke:var(--line)}}
.histogram .mark{{stroke:var(--faint);stroke-dasharray:3 3}}
.histogram polyline{{fill:none;stroke-width:2;stroke-linejoin:round}}
.l0{{stroke:var(--s0)}}.l1{{stroke:var(--s1)}}.l2{{stroke:var(--s2)}}.l3{{stroke:var(--s3)}}
.legend{{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;font-size:.82rem;color:var(--faint)}}
.legend i{{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.35rem;vertical-align:-.05rem}}
.s0{{fill:var(--s0);background:var(--s0)}}.s1{{fill:var(--s1);background:var(--s1)}}
.s2{{fill:var(--s2);background:var(--s2)}}.s3{{fill:var(--s3);background:var(--s3)}}
.large figure{{width:auto;margin:.75rem 0}}
.large .frame{{height:auto}}
.large img{{max-width:min(52rem,100%);max-height:none;border:0}}
.groups{{--side:96px}}
.pictures{{display:flex;flex-wrap:wrap;gap:.6rem}}
.groups.beside{{display:grid;grid-template-columns:repeat(auto-fill,minmax(calc(2*var(--side) + 3.5rem),1fr));gap:.75rem}}
.beside .group{{background:var(--card);border-radius:4px;padding:.1rem .75rem .6rem}}
.beside h3{{font-size:.82rem;line-height:1.35}}
.beside figure{{width:calc(var(--side) + .6rem)}}
figure{{margin:0;width:calc(var(--side) + 1.5rem)}}
.frame{{display:flex;align-items:flex-end;height:var(--side)}}
figure img{{display:block;max-width:var(--side);max-height:var(--side);width:auto;height:auto;border:1px solid var(--line)}}
.missing{{display:flex;align-items:center;justify-content:center;text-align:center;width:var(--side);height:var(--side);
border:1px dashed var(--line);color:var(--faint);font-size:.72rem;line-height:1.25;padding:.25rem;overflow:hidden}}
figcaption{{font-size:.72rem;line-height:1.3;margin-top:.2rem}}
figcaption span{{display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:2;overflow:hidden;unicode-bidi:isolate}}
figcaption span:first-child{{color:var(--text)}}
@media (max-width:40rem){{.bars th span{{max-width:7rem}}}}
@media print{{
body{{max-width:none;padding:0;font-size:10pt}}
nav{{display:none}}
*{{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
h2,h3{{break-after:avoid}}
figure,tr,.findings li,.figure,.chart svg,.beside .group{{break-inside:avoid}}
}}
""".replace("\n", "")
