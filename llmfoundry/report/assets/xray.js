"use strict";
const { tokens, layers, colours } = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const made = (tag, text, parent) => {
  const element = document.createElement(tag);
  element.textContent = text;
  parent.append(element);
  return element;
};
const visible = (text) => text.replaceAll("\n", "\u23ce").replaceAll("\t", "\u21e5").replaceAll(" ", "\u00b7");
const percent = (weight) => weight.toFixed(3);
const select = byId("layer"), text = byId("text"), spans = [];
let chosen = null; // an expert

function describe(t) {
  const place = byId("token");
  place.replaceChildren();
  made("p", `token ${t + 1} of ${tokens.length}: ${visible(tokens[t].text)} (id ${tokens[t].id})`, place);
  const table = made("table", "", place);
  for (const { layer, experts, weights } of layers) {
    const row = table.insertRow();
    made("th", `layer ${layer}`, row);
    experts[t].forEach((expert, k) => {
      made("td", `expert ${expert}: ${percent(weights[t][k])}`, row).style.background = colours[expert];
    });
  }
}

function mark() {
  const { experts } = layers[select.value];
  text.className = chosen === null ? "" : "only";
  spans.forEach((span, t) => { span.className = experts[t].includes(chosen) ? "on" : ""; });
  for (const button of byId("legend").children) button.className = Number(button.dataset.expert) === chosen ? "on" : "";
}

function draw() {
  const { layer, experts, weights } = layers[select.value];
  spans.forEach((span, t) => {
    span.style.background = colours[experts[t][0]];
    span.title = `layer ${layer}: ` + experts[t].map((e, k) => `expert ${e} (${percent(weights[t][k])})`).join(", ");
  });
  const counts = new Map();
  for (const expert of experts.flat()) counts.set(expert, (counts.get(expert) ?? 0) + 1);
  byId("legend").replaceChildren();
  for (const [expert, n] of [...counts].sort((a, b) => a[0] - b[0])) {
    const button = made("button", `expert ${expert}: ${n}`, byId("legend"));
    button.dataset.expert = expert;
    button.style.background = colours[expert];
    button.onclick = () => {
      chosen = chosen === expert ? null : expert;
      mark();
    };
  }
  mark();
}

layers.forEach(({ layer }, i) => select.add(new Option(layer, i)));
tokens.forEach((token, t) => {
  const span = made("span", token.text, text);
  span.onmouseenter = () => describe(t);
  spans.push(span);
});
select.onchange = draw;
draw();
describe(0);
document.body.dataset.drawn = "true";
