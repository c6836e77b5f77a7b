"use strict";
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const root = document.documentElement;
  const drawn = new Map();  // element -> layout as it was given, before the colours of a theme
  const byId = (id) => document.getElementById(id);

  // -- light and dark: the system's choice until the button is pressed; paper is light
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const dark = () => (chosen === null ? system.matches : chosen === "dark");
  const colours = (isDark) => ({
    text: isDark ? "#e6e8eb" : "#1b1f24",
    line: isDark ? "#363c44" : "#d5d9df",
    back: isDark ? "#1d2126" : "#ffffff",
  });

  function themed(layout, isDark) {
    const c = colours(isDark);
    const out = {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { ...(layout.font || {}), color: c.text, size: 12 },
      hoverlabel: { bgcolor: c.back, bordercolor: c.line, font: { color: c.text } },
      dragmode: false,
    };
    for (const name of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(name)) {
        out[name] = { gridcolor: c.line, zerolinecolor: c.line, linecolor: c.line, automargin: true, fixedrange: true,
                      ...layout[name] };
        if (layout[name].title) out[name].title = { standoff: name[0] === "y" ? 12 : 8, ...layout[name].title };
      }
    }
    return out;
  }

  // Text is readable at once; figures follow one by one, so that neither opening nor scrolling waits for all of them.
  const waiting = new Map();
  function soon(element, figure) {
    if (!element) return;
    waiting.set(element, figure);
    if (waiting.size === 1) setTimeout(next, 0);
  }
  function next() {
    const first = waiting.entries().next();
    if (first.done) return;
    const [element, figure] = first.value;
    waiting.delete(element);
    draw(element, figure);
    if (waiting.size) setTimeout(next, 0);
    else document.documentElement.dataset.drawn = "all";
  }
  function drawAll() {
    while (waiting.size) next();
  }

  function draw(element, figure) {
    drawn.set(element, figure);
    Plotly.react(element, figure.data, themed(figure.layout, root.dataset.theme === "dark"),
                 { responsive: true, displayModeBar: false });
    if (figure.clicked && !element.dataset.clicks) {
      element.dataset.clicks = "heard";
      element.on("plotly_click", (event) => drawn.get(element).clicked(event.points[0]));
    }
  }

  function paint(isDark) {
    root.dataset.theme = isDark ? "dark" : "light";
    for (const [element, figure] of drawn) Plotly.react(element, figure.data, themed(figure.layout, isDark));
  }
  root.dataset.theme = dark() ? "dark" : "light";
  system.addEventListener("change", () => paint(dark()));
  byId("theme").addEventListener("click", () => { chosen = dark() ? "light" : "dark"; paint(dark()); });
  window.addEventListener("beforeprint", () => {
    drawAll();
    document.querySelectorAll("details").forEach((one) => { one.open = true; });
    paint(false);
    for (const element of drawn.keys()) {  // a narrow sheet, whatever the window's width
      Plotly.relayout(element, { width: element.classList.contains("square") ? 460 : 660, autosize: false });
    }
  });
  window.addEventListener("afterprint", () => {
    for (const element of drawn.keys()) Plotly.relayout(element, { width: null, autosize: true });
    paint(dark());
  });

  for (const [name, figure] of Object.entries(page.figures)) soon(byId(name), figure);
  if (page.experts) experts(page.experts);

  // -- per expert: one layer at a time, and all of them as a picture
  function experts(told) {
    const layers = told.layers;
    const pick = byId("layer");
    const measure = byId("measure");
    const show = () => {
      const layer = layers[Number(pick.value)];
      fill(layer);
      const map = (told.maps || {})[layer.number];
      if (byId("similarity-plot")) similarity(layer, map);
    };
    pick.addEventListener("change", show);
    if (measure) {
      measure.addEventListener("change", () => overview(told, measure.value));
      overview(told, measure.value);
    }
    show();
  }

  function overview(told, name) {
    const measure = told.measures.find((one) => one.name === name);
    const z = told.layers.map((layer) => layer[name] || []);
    soon(byId("experts-plot"), {
      clicked: (point) => {
        const found = told.layers.findIndex((layer) => String(layer.number) === String(point.y));
        byId("layer").value = String(found);
        byId("layer").dispatchEvent(new Event("change"));
      },
      data: [{
        type: "heatmap", z, y: told.layers.map((layer) => String(layer.number)), colorscale: "Cividis",
        colorbar: { thickness: 10, outlinewidth: 0, tickformat: measure.format },
        hovertemplate: `layer %{y}, expert %{x}<br>${measure.title}: %{z:${measure.format}}<extra></extra>`,
      }],
      layout: {
        height: Math.max(260, Math.min(720, 90 + 14 * told.layers.length)),
        margin: { l: 44, r: 8, t: 8, b: 44 },
        xaxis: { title: { text: "expert" }, showgrid: false, zeroline: false },
        yaxis: { title: { text: "layer" }, autorange: "reversed", type: "category", showgrid: false },
      },
    });
  }

  function cell(text, kind) {
    const td = document.createElement("td");
    td.textContent = text;
    if (kind) td.className = kind;
    return td;
  }

  function fill(layer) {
    const body = byId("experts-rows");
    const rows = layer.share.map((_, expert) => {
      const tr = document.createElement("tr");
      tr.append(cell(String(expert)));
      for (const column of page.experts.columns) {
        const values = layer[column.name];
        const value = values ? values[expert] : null;
        tr.append(cell(written(value, column.format), column.format === "text" ? "left" : ""));
      }
      const state = document.createElement("td");
      state.className = "left";
      for (const flag of layer.flags[expert] || []) {
        const badge = document.createElement("span");
        badge.className = "badge " + (flag === "dead" ? "bad" : "warn");
        badge.textContent = flag;
        state.append(badge, " ");
      }
      tr.append(state);
      return tr;
    });
    body.replaceChildren(...rows);
    byId("experts-note").textContent = layer.note;
  }

  function written(value, format) {
    if (value === null || value === undefined) return "–";
    if (format === "text") return value;
    if (format === "percent") return (100 * value).toFixed(1) + "%";
    if (format === "shares") return value.map((share) => (100 * share).toFixed(1)).join(" / ");
    if (format === "count") return value.toLocaleString("en");
    return Number(value).toPrecision(3);
  }

  function similarity(layer, map) {
    const note = byId("similarity-note");
    const element = byId("similarity-plot");
    element.hidden = !map;
    note.textContent = map ? `Layer ${layer.number}: ${map.metric}; ${map.better === "less" ? "less" : "more"} is better.`
                           : `Layer ${layer.number} has none stored.`;
    if (!map) return;
    const log = map.scale === "log10";
    const raw = atob(map.levels);
    const size = map.count;
    const z = [];
    for (let i = 0; i < size; i += 1) {
      const row = [];
      for (let j = 0; j < size; j += 1) {
        row.push(i === j ? null : map.low + (raw.charCodeAt(i * size + j) / 255) * (map.high - map.low));
      }
      z.push(row);
    }
    const x = [], y = [];
    for (const group of layer.groups) {
      for (const a of group) for (const b of group) if (a !== b) { x.push(a); y.push(b); }
    }
    const marker = { symbol: "square-open", size: Math.max(4, Math.min(16, 360 / size)), color: "#e4572e",
                     line: { width: 2 } };
    const side = { showgrid: false, zeroline: false, constrain: "domain" };
    soon(element, {
      data: [
        { type: "heatmap", z, colorscale: "Cividis", reversescale: map.better === "less",
          colorbar: { thickness: 10, outlinewidth: 0, tickprefix: log ? "10^" : "" },
          hovertemplate: `experts %{x} and %{y}: ${log ? "10^" : ""}%{z:.4f}<extra></extra>` },
        { type: "scatter", mode: "markers", x, y, marker, name: "chosen", hoverinfo: "skip", showlegend: false },
      ],
      layout: {
        margin: { l: 44, r: 8, t: 8, b: 44 },
        xaxis: { ...side, title: { text: "expert" }, range: [-0.5, size - 0.5] },
        yaxis: { ...side, title: { text: "expert" }, range: [size - 0.5, -0.5], scaleanchor: "x" },
      },
    });
  }
})();
