"use strict";
// Draws the charts from the numbers in the page. Names come from files that others wrote: they reach charts as escaped text, never as markup.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const state = { order: "number", scale: "layer", coverage: "routed" };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const MARKED_CELLS = 2500; // beyond it, crosses on dropped cells cost more than they tell

  const escape = (text) => String(text).replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const narrow = () => window.innerWidth < 640;

  // A colour between the paper and a hue: more is stronger, in light and dark alike.
  const mixed = (from, to, share) => {
    const parts = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    const [a, b] = [parts(from), parts(to)];
    return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * share)).join(",")})`;
  };
  const ramp = (name) => [0, 0.25, 0.5, 0.75, 1].map((at) => [at, mixed(colour("paper"), colour(name), 0.12 + 0.88 * at)]);

  // The darker or the lighter of ink and paper, whichever has more contrast (WCAG's relative luminance).
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const readable = (background) => {
    const behind = luminance(background.match(/\d+/g).map(Number));
    const contrast = (name) => {
      const before = luminance([1, 3, 5].map((at) => parseInt(colour(name).slice(at, at + 2), 16)));
      return (Math.max(before, behind) + 0.05) / (Math.min(before, behind) + 0.05);
    };
    return contrast("ink") >= contrast("paper") ? colour("ink") : colour("paper");
  };

  const layout = (changes = {}) => {
    const { xaxis = {}, yaxis = {}, ...rest } = changes;
    const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true, fixedrange: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("ink"), family: "system-ui, sans-serif", size: narrow() ? 11 : 13 },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") }, align: "left" },
      margin: { l: 48, r: 16, t: 36, b: 44 }, height: 340, dragmode: false, showlegend: false,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      ...rest, xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis },
    };
  };
  const options = { displayModeBar: false, responsive: true };
  const draw = (id, traces, changes) => {
    const element = document.getElementById(id);
    if (element) window.Plotly.react(element, traces, layout(changes), options);
  };
  const title = (text) => ({ text, x: 0, xanchor: "left", xref: "paper", font: { size: 14 } });

  // ---- saliency

  const ordered = (layer) => {
    const experts = layer.score.map((_, expert) => expert);
    if (state.order === "number") return experts;
    const by = layer[state.order];
    return experts.sort((a, b) => by[b] - by[a] || a - b);
  };

  function drawSaliency() {
    const { layers } = charts.saliency;
    const all = Math.max(...layers.flatMap((layer) => layer.score)) || 1;
    const [kept, dropped, texts, crosses] = [[], [], [], { x: [], y: [] }];
    layers.forEach((layer, row) => {
      const highest = state.scale === "layer" ? Math.max(...layer.score) || 1 : all;
      const order = ordered(layer);
      kept.push(order.map((expert) => (layer.number[expert] === null ? null : layer.score[expert] / highest)));
      dropped.push(order.map((expert) => (layer.number[expert] === null ? layer.score[expert] / highest : null)));
      texts.push(order.map((expert) => {
        const number = layer.number[expert];
        const fate = number === null ? "<b>dropped</b>" : `kept, expert ${number} of the output`;
        const routed = layer.routed[expert].toLocaleString("en");
        return `layer ${layer.layer}, expert ${expert}<br>saliency ${layer.score[expert]}<br>${routed} routed tokens<br>${fate}`;
      }));
      order.forEach((expert, at) => {
        if (layer.number[expert] === null) { crosses.x.push(at); crosses.y.push(row); }
      });
    });
    const rows = layers.map((_, row) => row);
    const heat = { type: "heatmap", y: rows, zmin: 0, zmax: 1, text: texts, hovertemplate: "%{text}<extra></extra>", hoverongaps: false, xgap: layers.length < 20 ? 1 : 0, ygap: 1, showscale: false };
    const traces = [
      { ...heat, z: kept, colorscale: ramp("kept"), name: "kept" },
      { ...heat, z: dropped, colorscale: ramp("dropped"), name: "dropped" },
    ];
    if (crosses.x.length <= MARKED_CELLS) {
      const size = narrow() ? 3.5 : 6;
      traces.push({ type: "scatter", mode: "markers", ...crosses, hoverinfo: "skip", marker: { symbol: "x-thin", size, line: { width: 1, color: colour("ink") } } });
    }
    const every = Math.max(1, Math.ceil(layers.length / 16));
    const height = Math.min(900, Math.max(260, 90 + 24 * layers.length));
    draw("chart-saliency", traces, {
      height, margin: { l: 48, r: 8, t: 10, b: 44 },
      xaxis: { range: [-0.5, layers[0].score.length - 0.5], title: { text: state.order === "number" ? "expert" : "rank in its layer" }, showgrid: false, zeroline: false },
      yaxis: { title: { text: "layer" }, autorange: "reversed", showgrid: false, zeroline: false, tickvals: rows.filter((row) => row % every === 0), ticktext: layers.filter((_, row) => row % every === 0).map((layer) => String(layer.layer)) },
    });
  }

  // ---- saliency mass

  function drawMass() {
    const { kept, share, layers, own, chosen, num_experts } = charts.mass;
    const x = kept.map((count) => 1 - count / num_experts);
    const label = kept.map((count) => `${count} of ${num_experts} kept`);
    const line = (values, name, extra) => ({ type: "scatter", mode: "lines", x, y: values, name, text: label, hovertemplate: `%{text}<br>${name}: %{y:.1%}<extra></extra>`, ...extra });
    const at = 1 - chosen / num_experts;
    draw("chart-mass", [
      line(share.map((row) => Math.min(...row)), "worst layer", { line: { color: colour("kept"), width: 1, dash: "dot" } }),
      line(share.map((row) => Math.max(...row)), "best layer", { line: { color: colour("kept"), width: 1, dash: "dot" }, fill: "tonexty", fillcolor: mixed(colour("paper"), colour("kept"), 0.22) }),
      line(share.map(mean), "mean over layers", { mode: "lines+markers", line: { color: colour("kept"), width: 3 } }),
      { type: "scatter", mode: "markers", x: [at], y: [mean(own)], marker: { symbol: "diamond", size: 12, color: colour("dropped"), line: { color: colour("paper"), width: 1 } }, hovertemplate: `this output: %{y:.1%}<extra></extra>` },
    ], {
      title: title("by share of experts removed"),
      xaxis: { tickformat: ".0%", title: { text: "experts removed" }, range: [0, Math.max(...x)] }, yaxis: { tickformat: ".0%", range: [0, 1.03] },
      shapes: [{ type: "line", x0: at, x1: at, y0: 0, y1: 1, yref: "paper", line: { color: colour("dropped"), width: 2, dash: "dash" } }],
      annotations: [{ x: at, y: 0.04, yref: "paper", text: "this output", showarrow: false, xanchor: at > 0.5 ? "right" : "left", xshift: at > 0.5 ? -6 : 6, font: { color: colour("dropped") } }],
    });
    draw("chart-mass-layers", [{
      type: "bar", x: layers.map(String), y: own, marker: { color: colour("kept") }, hovertemplate: "layer %{x}<br>%{y:.1%} of the saliency kept<extra></extra>",
    }], { title: title("this output, by layer"), xaxis: { type: "category", title: { text: "layer" }, nticks: 16 }, yaxis: { tickformat: ".0%", range: [0, 1] } });
  }

  // ---- domains

  const MEANING = {
    routed: "Of the token-expert pairs that the router formed on a domain's text, the share that went to experts that stay. A domain far below the others will miss what was removed.",
    saliency: "Of the sum of gate weight × output norm over a domain's tokens, the share that experts that stay contributed.",
    choice: "Of the experts that would have been kept had this domain been the only calibration text, the share that is kept.",
  };

  function drawCoverage() {
    const { domains, tokens, layers, shares } = charts.coverage;
    const values = shares[state.coverage];
    document.getElementById("coverage-meaning").textContent = MEANING[state.coverage];
    const names = domains.map((name, i) => `${escape(name)}<br>${tokens[i].toLocaleString("en")} tokens`);
    const columns = [...layers.map(String), "all"];
    const z = values.map((row) => [...row, mean(row)]);
    const low = Math.max(0, Math.min(...z.flat()) - 0.05);
    const small = columns.length <= (narrow() ? 8 : 24);
    draw("chart-coverage", [{
      type: "heatmap", x: columns.map((_, i) => i), y: names.map((_, i) => i), z, zmin: low, zmax: 1, colorscale: ramp("kept"), xgap: 1, ygap: 2, showscale: !narrow(),
      text: z.map((row, d) => row.map((share, l) => `${escape(domains[d])}, ${columns[l] === "all" ? "mean over layers" : `layer ${columns[l]}`}<br>${percent(share)} kept`)),
      hovertemplate: "%{text}<extra></extra>", colorbar: { tickformat: ".0%", thickness: 12, outlinewidth: 0 },
    }], {
      height: 110 + Math.max(2, domains.length) * 46, margin: { l: 60, r: 8, t: 10, b: 44 },
      annotations: small ? z.flatMap((row, d) => row.map((share, l) => ({ x: l, y: d, text: (100 * share).toFixed(0), showarrow: false, font: { size: narrow() ? 10 : 12, color: readable(mixed(colour("paper"), colour("kept"), 0.12 + (0.88 * (share - low)) / (1 - low || 1))) } }))) : [],
      xaxis: { title: { text: "layer" }, showgrid: false, zeroline: false, tickvals: columns.map((_, i) => i).filter((i) => columns.length < 20 || i % 5 === 0 || i === columns.length - 1), ticktext: columns.filter((_, i) => columns.length < 20 || i % 5 === 0 || i === columns.length - 1) },
      yaxis: { autorange: "reversed", showgrid: false, zeroline: false, tickvals: names.map((_, i) => i), ticktext: names },
    });
  }

  // ---- stability

  function drawStability() {
    const { apart, whole, layers, chance } = charts.stability;
    const series = (parts, name, style) => ({
      type: "scatter", mode: "lines+markers", name, x: parts.map((part) => part.tokens), y: parts.map((part) => mean(part.jaccard.flat())),
      error_y: { type: "data", symmetric: false, thickness: 1,
        array: parts.map((part) => Math.max(...part.jaccard.map(mean)) - mean(part.jaccard.flat())),
        arrayminus: parts.map((part) => mean(part.jaccard.flat()) - Math.min(...part.jaccard.map(mean))) },
      text: parts.map((part) => `${part.quarters} of 4 folds, ${part.jaccard.length} comparisons`), hovertemplate: `${name}<br>%{text}<br>%{x:,} tokens: %{y:.3f}<extra></extra>`, ...style,
    });
    const bottom = Math.max(0, Math.min(chance, ...apart.flatMap((part) => part.jaccard.flat())) - 0.05);
    const dotted = { type: "line", x0: 0, x1: 1, xref: "paper", y0: chance, y1: chance, line: { color: colour("soft"), dash: "dot", width: 1.5 } };
    draw("chart-stability", [
      series(apart, "parts apart", { line: { color: colour("kept"), width: 3 }, marker: { size: 9 } }),
      series(whole, "a part against the whole", { line: { color: colour("dropped"), width: 2, dash: "dash" }, marker: { size: 8, symbol: "diamond" } }),
    ], { title: title("by tokens in a part"), showlegend: true, height: 380, legend: { orientation: "h", x: 0, y: -0.24, yanchor: "top" }, margin: { l: 48, r: 16, t: 36, b: 96 },
      xaxis: { title: { text: "calibration tokens in a part" }, rangemode: "tozero" }, yaxis: { range: [bottom, 1.01] }, shapes: [dotted] });
    const halves = apart[apart.length - 1].jaccard;
    draw("chart-stability-layers", [{
      type: "bar", x: layers.map(String), y: layers.map((_, l) => mean(halves.map((row) => row[l]))), marker: { color: colour("kept") },
      hovertemplate: "layer %{x}<br>Jaccard of halves apart %{y:.3f}<extra></extra>",
    }], { title: title("halves apart, by layer"), xaxis: { type: "category", title: { text: "layer" }, nticks: 16 }, yaxis: { range: [0, 1] }, shapes: [dotted] });
  }

  // ---- fidelity and memory

  const errors = (figures) => ({ type: "data", array: figures.map((figure) => figure.standard_error || 0), thickness: 1.5, color: colour("ink") });

  function drawFidelity() {
    const { domains, kl, top1, tokens, by_layer } = charts.fidelity;
    const bars = (id, figures, text, hue, extra) => draw(id, [{
      type: "bar", orientation: "h", y: domains.map((_, i) => i), x: figures.map((figure) => figure.value), error_x: errors(figures), marker: { color: colour(hue) },
      text: figures.map((figure, i) => `${escape(domains[i])}<br>${figure.value.toFixed(4)}${figure.standard_error === null ? "" : ` ± ${figure.standard_error.toFixed(4)}`}<br>${tokens[i].toLocaleString("en")} tokens`),
      textposition: "none", hovertemplate: "%{text}<extra></extra>",
    }], { title: title(text), height: 130 + 34 * domains.length, margin: { l: 60, r: 16, t: 36, b: 40 },
      yaxis: { autorange: "reversed", tickvals: domains.map((_, i) => i), ticktext: domains.map(escape), showgrid: false }, xaxis: extra });
    bars("chart-kl", kl, "KL(original ‖ pruned), nats per token", "dropped", { rangemode: "tozero" });
    bars("chart-top1", top1, "top-1 agreement", "kept", { range: [0, 1], tickformat: ".0%" });
    const dashes = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
    const hues = ["kept", "dropped", "third", "soft"];
    draw("chart-layers", by_layer.map((part, i) => ({
      type: "scatter", mode: "lines+markers", name: escape(part.domain), x: part.layers, y: part.output_error.map((figure) => figure.value),
      error_y: errors(part.output_error), line: { color: part.domain === "all" ? colour("ink") : colour(hues[i % hues.length]), dash: part.domain === "all" ? "solid" : dashes[Math.floor(i / hues.length + 1) % dashes.length], width: part.domain === "all" ? 3 : 1.5 },
      text: part.layers.map(() => escape(part.domain)), hovertemplate: "%{text}, layer %{x}<br>relative error %{y:.4f}<extra></extra>",
    })), { title: title("relative error of every layer's output"), height: 380, showlegend: true, legend: { orientation: "h", x: 0, y: -0.24, yanchor: "top" }, margin: { l: 48, r: 16, t: 36, b: 110 },
      xaxis: { title: { text: "layer" } }, yaxis: { rangemode: "tozero" } });
  }

  function drawMemory() {
    const { parts } = charts.memory;
    const total = { before: 0, after: 0 };
    for (const part of parts) { total.before += part.before; total.after += part.after; }
    const shades = [1, 0.75, 0.55, 0.4, 0.3, 0.22, 0.16];
    draw("chart-memory", parts.map((part, i) => ({
      type: "bar", orientation: "h", name: escape(part.name), y: ["after", "before"], x: [part.after, part.before],
      marker: { color: mixed(colour("paper"), colour(i ? "soft" : "kept"), i ? shades[i % shades.length] : 1), line: { color: colour("paper"), width: 1 } },
      text: ["after", "before"].map((when) => `${escape(part.name)}, ${when}<br>${part[when].toLocaleString("en")} bytes, ${percent(part[when] / total[when])}`),
      textposition: "none", hovertemplate: "%{text}<extra></extra>",
    })), { barmode: "stack", height: narrow() ? 300 : 230, showlegend: true, legend: { orientation: "h", x: 0, y: -0.28, yanchor: "top", traceorder: "normal" }, margin: { l: 60, r: 16, t: 10, b: narrow() ? 130 : 70 }, xaxis: { ticksuffix: "B", tickformat: "~s" }, yaxis: { showgrid: false } });
  }

  function drawAll() {
    if (charts.saliency) { drawSaliency(); drawMass(); drawCoverage(); drawStability(); }
    if (charts.fidelity) drawFidelity();
    drawMemory();
  }

  for (const group of document.querySelectorAll("[data-control]")) {
    group.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      state[group.dataset.control] = button.dataset.value;
      for (const other of group.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
      if (group.dataset.control === "coverage") drawCoverage(); else drawSaliency();
    });
  }

  async function load() {
    const packed = Uint8Array.from(atob(document.getElementById("library").textContent), (letter) => letter.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const source = await new Response(unpacked).arrayBuffer();
    const script = document.createElement("script");
    script.src = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    await new Promise((resolve, reject) => { script.onload = resolve; script.onerror = reject; document.head.append(script); });
    URL.revokeObjectURL(script.src);
    drawAll();
    dark.addEventListener("change", drawAll);
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if ((width < 640) !== narrow()) drawAll();
      width = window.innerWidth;
    });
    document.documentElement.dataset.drawn = "yes";
  }

  load().catch((error) => {
    const notice = document.getElementById("failure");
    notice.textContent = `The charts could not be drawn: ${error}. The tables below hold their numbers.`;
    notice.hidden = false;
  });
})();
