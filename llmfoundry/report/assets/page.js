"use strict";
const { runs, panels, kinds, differing } = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const ROW = 19; // pixels of a row of the legend
const layout = (title, rows, more = {}) => ({
  title: { text: title, font: { size: 13 }, x: 0.02, xanchor: "left" },
  margin: { l: 56, r: 16, t: 36, b: 44 + ROW * rows },
  font: { family: "system-ui, sans-serif", size: 11 },
  legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom" }, ...more,
});
function legendRows(names, width) {
  if (names.length < 2) return 0;
  const longest = Math.max(...names.map((name) => name.length));
  return Math.ceil(names.length / Math.max(1, Math.floor(width / (longest * 6 + 50))));
}
const options = { responsive: true, displaylogo: false, displayModeBar: false };
function panel(parent, id, traces, title, more = {}, wide = false) {
  let place = byId(id);
  if (!place) {
    place = document.createElement("div");
    place.id = id;
    place.className = wide ? "panel wide" : "panel";
    parent.append(place);
  }
  const names = traces.filter((trace) => trace.mode === "lines").map((trace) => trace.name);
  const rows = legendRows(names, place.clientWidth - 72);
  place.style.height = rows > 1 ? `${(wide ? 360 : 300) + ROW * (rows - 1)}px` : "";
  Plotly.react(place, traces, layout(title, rows, more), options);
}
const short = (name) => name.split("/").pop();
const number = (value) => typeof value === "number"
  ? value.toLocaleString("en", { maximumSignificantDigits: 4 }) : String(value);

function facts() {
  const place = byId("facts");
  for (const run of runs) {
    const line = document.createElement("div");
    const shown = { steps: run.last.step, tokens: run.last.tokens, loss: run.last["loss/train/ce"], ...run.summary };
    const keys = ["steps", "tokens", "loss", "validation/nats_per_token", "validation/bits_per_byte", "params",
      "active_params", "tokens_per_sec", "seconds"];
    for (const key of keys.filter((k) => shown[k] !== undefined && shown[k] !== null)) {
      const item = document.createElement("span"), value = document.createElement("b");
      value.textContent = number(shown[key]);
      item.append(`${short(key).replaceAll("_", " ")} `, value);
      line.append(item);
    }
    if (runs.length > 1) line.prepend(`${run.name}: `);
    place.append(line);
    for (const text of run.alarms) {
      const alarm = document.createElement("p");
      alarm.className = "alarm";
      alarm.textContent = runs.length > 1 ? `${run.name}: ${text}` : text;
      byId("alarms").append(alarm);
    }
  }
}

function differences() {
  if (differing.length === 0) return;
  byId("differing").hidden = false;
  const table = byId("settings"), head = table.insertRow();
  for (const text of ["", ...runs.map((run) => run.name)]) {
    head.append(Object.assign(document.createElement("th"), { textContent: text }));
  }
  for (const texts of differing) {
    const row = table.insertRow();
    for (const text of texts) row.insertCell().textContent = text;
  }
}

function curves() {
  panels.forEach(([title, unit, names], i) => {
    const traces = runs.flatMap((run) => names.filter((name) => run.curves[name]).map((name) => ({
      ...run.curves[name], name: runs.length > 1 ? `${run.name} ${short(name)}` : short(name), mode: "lines",
      line: { width: name.startsWith("metrics/eval") ? 2.5 : 1.3 },
    })));
    if (traces.length === 0) return;
    const loss = title === "Loss";
    panel(byId("curves"), `curve-${i}`, traces, title,
      { xaxis: { title: { text: "step" } }, yaxis: { title: { text: unit }, type: loss ? "log" : "linear" } }, loss);
  });
}

function lines(values, layers, x) {
  return layers.map((layer, l) => ({ x, y: values.map((at) => (at ? at[l] : null)), name: `layer ${layer}`, mode: "lines",
    line: { width: 1.2 } }));
}

function experts(run, l) {
  const place = byId("experts"), found = run.experts, steps = { title: { text: "step" } };
  const layer = found.layers[l];
  panel(place, "load", [{ z: found.load[l].map((row) => row.map((v) => v / 1000)), x: found.steps, type: "heatmap",
    zmin: 0, zmax: 3, colorscale: [[0, "#67001f"], [0.05, "#f4a582"], [0.333, "#f7f7f7"], [1, "#2166ac"]] }],
    `Layer ${layer}: load of each expert, in even shares`, { xaxis: steps, yaxis: { title: { text: "expert" } } }, true);
  panel(place, "entropy", lines(found.entropy, found.layers, found.steps), "Router entropy, nats per token",
    { xaxis: steps });
  const dead = found.load.map((rows, k) => ({ x: found.steps, name: `layer ${found.layers[k]}`, mode: "lines",
    y: found.steps.map((_, t) => rows.filter((row) => row[t] < 10).length), line: { width: 1.2 } }));
  panel(place, "dead", dead, "Experts below 1 % of an even share", { xaxis: steps });
  if (found.confidence.length > 0) {
    const at = { xaxis: steps };
    panel(place, "confidence", lines(found.confidence, found.layers, found.probe_steps),
      "Confidence: mean of the highest score", at);
    panel(place, "churn", lines(found.churn, found.layers, found.probe_steps),
      "Share of tokens whose experts changed since the last evaluation", at);
  }
  if (found.bias) {
    const { scale, values } = found.bias, real = (v, k) => (v === null ? null : (v * scale[k]) / 1000);
    panel(place, "bias", [{ z: values[l].map((row) => row.map((v) => real(v, l))), x: found.steps, type: "heatmap",
      colorscale: "RdBu", zmid: 0 }], `Layer ${layer}: bias of each expert`, { xaxis: steps });
    panel(place, "drift", values.map((rows, k) => ({ x: found.steps, name: `layer ${found.layers[k]}`, mode: "lines",
      line: { width: 1.2 }, y: found.steps.map((_, t) => Math.max(...rows.map((row) => real(row[t], k)))
        - Math.min(...rows.map((row) => real(row[t], k)))) })), "Drift of the bias: highest minus lowest", { xaxis: steps });
  }
  if (!run.probe) return;
  const probe = run.probe.layers[l];
  panel(place, "pairs", [{ z: probe.pairs, type: "heatmap", zmin: 0, zmax: 2, colorscale: "RdBu", reversescale: true }],
    `Layer ${layer}: pairs that take the same token (1: by chance)`, {});
  panel(place, "kinds", [{ z: probe.kinds, x: kinds, type: "heatmap", colorscale: [[0, "#f7fbff"], [1, "#08306b"]] }],
    `Layer ${layer}: kinds of tokens of each expert`, { yaxis: { title: { text: "expert" } } });
  if (probe.sources) {
    panel(place, "sources", [{ z: probe.sources, x: run.probe.sources, type: "heatmap", zmin: 0, zmax: 2,
      colorscale: "RdBu", reversescale: true }], `Layer ${layer}: sources of each expert's tokens (1: by chance)`,
      { yaxis: { title: { text: "expert" } } });
  }
  const table = byId("tokens");
  table.replaceChildren();
  probe.tokens.forEach((tokens, e) => {
    const row = table.insertRow();
    row.insertCell().textContent = `expert ${e}`;
    const cell = row.insertCell();
    for (const token of tokens) {
      const code = document.createElement("code");
      code.textContent = token.replaceAll("\n", "\u23ce").replaceAll("\t", "\u21e5").replaceAll(" ", "\u00b7");
      cell.append(code);
    }
  });
}

function choose(select, labels, changed) {
  labels.forEach((label, i) => select.add(new Option(label, i)));
  select.onchange = () => changed(Number(select.value));
}

facts();
differences();
curves();
const mixed = runs.filter((run) => run.experts);
if (mixed.length > 0) {
  byId("mixture").hidden = false;
  let run = mixed[0];
  const layer = byId("layer");
  const draw = (chosen) => {
    run = mixed[chosen];
    byId("experts").replaceChildren(); // another run may have other panels
    byId("tokens").replaceChildren();
    layer.replaceChildren();
    choose(layer, run.experts.layers, (l) => experts(run, l));
    experts(run, 0);
  };
  choose(byId("run"), mixed.map((each) => each.name), draw);
  draw(0);
}
document.body.dataset.drawn = "true";
