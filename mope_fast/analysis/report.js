"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { layers, experts, unit, curves, classes, samples } = data;
  const FIRST_EXPERTS = 16;
  const VIRIDIS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
  const DIVERGING = [[179, 88, 6], [224, 130, 20], [253, 184, 99], [254, 224, 182], [247, 247, 247], [216, 218, 235], [178, 171, 210], [128, 115, 172], [84, 39, 136]];
  const byId = (id) => document.getElementById(id);
  const tip = byId("tip");
  let layer = 0;
  let view = "score";
  let all = false;

  function add(parent, name, attributes = {}, text = null) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    parent.append(element);
    return element;
  }

  function draw(parent, name, attributes = {}, text = null) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    parent.append(element);
    return element;
  }

  function picture(parent, width, height, label) {
    return draw(parent, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  }

  function mix(stops, part) {
    const place = Math.min(Math.max(part, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return `rgb(${stops[low].map((value, i) => Math.round(value + (place - low) * (stops[low + 1][i] - value))).join()})`;
  }

  const pen = document.createElement("canvas").getContext("2d");
  function textWidth(text) {
    pen.font = `11.5px ${getComputedStyle(document.body).fontFamily}`;
    return pen.measureText(text).width;
  }
  function clipped(text, width) {
    if (textWidth(text) <= width) return text;
    let length = text.length;
    while (length > 1 && textWidth(`${text.slice(0, length)}…`) > width) length -= 1;
    return `${text.slice(0, length)}…`;
  }

  const number = (value) => value.toFixed(4);
  const share = (value) => (value === null ? null : value * unit);
  const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)}%`;
  const toFair = (value) => `${(value * experts).toFixed(2)} × the fair share`;

  function showTip(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const room = document.documentElement.clientWidth - box.width - 8;
    tip.style.left = `${Math.max(8, Math.min(x + 14, room))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 12) : y + 18}px`;
  }
  function hideTip() {
    tip.hidden = true;
  }

  // let the pointer and the arrow keys explore cells (column, row): mark them and show their tooltips
  function explore(host, svg, { columns, rows, box, text, pick, label }) {
    const cursor = draw(svg, "rect", { class: "cursor", visibility: "hidden" });
    let place = null;
    function mark(column, row) {
      place = [column, row];
      const [x, y, width, height] = box(column, row);
      for (const [key, value] of Object.entries({ x, y, width, height, visibility: "visible" })) cursor.setAttribute(key, value);
      return [x, y, width, height];
    }
    function leave() {
      cursor.setAttribute("visibility", "hidden");
      hideTip();
    }
    function find(event) {
      const area = svg.getBoundingClientRect();
      const [x0, y0, width, height] = box(0, 0);
      const column = Math.floor((event.clientX - area.left - x0) / width);
      const row = Math.floor((event.clientY - area.top - y0) / height);
      return column >= 0 && column < columns && row >= 0 && row < rows ? [column, row] : null;
    }
    function point(event) {
      const found = find(event);
      if (!found) return leave();
      mark(...found);
      showTip(text(...found), event.clientX, event.clientY);
    }
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", leave);
    if (pick) svg.addEventListener("click", (event) => find(event) && pick(...find(event)));
    host.tabIndex = 0;
    host.setAttribute("role", "group");
    host.setAttribute("aria-label", `${label}. Arrow keys go through the values${pick ? ", Enter chooses the layer" : ""}.`);
    host.addEventListener("blur", leave);
    host.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      if (event.key === "Escape") return leave();
      if (event.key === "Enter" && pick && place) return pick(...place);
      if (!moves[event.key]) return undefined;
      event.preventDefault();
      const [right, down] = place ? moves[event.key] : [0, 0];
      const [column, row] = place || [0, 0];
      const to = [Math.min(Math.max(column + right, 0), columns - 1), Math.min(Math.max(row + down, 0), rows - 1)];
      const [x, y, width, height] = mark(...to);
      if (host.scrollWidth > host.clientWidth) host.scrollLeft = x + width / 2 - host.clientWidth / 2;
      const area = svg.getBoundingClientRect();
      showTip(text(...to), area.left + x + width / 2, area.top + y + height);
      byId("said").textContent = text(...to);
      return undefined;
    });
  }

  function labelWidth(names, width) {
    return Math.ceil(Math.min(Math.max(...names.map(textWidth)) + 8, Math.max(64, 0.32 * width)));
  }

  // spec: label, rows, columns (names), value(row, column), color(value), text(column, row), rowHeight, least, under, left, pick
  function heatMap(host, spec) {
    host.textContent = "";
    const heat = add(host, "div", { class: "heat" });
    const width = host.clientWidth;
    const left = spec.left || labelWidth(spec.rows, width);
    const cell = Math.max(spec.least, (width - left) / spec.columns.length);
    const span = cell * spec.columns.length;
    const tall = spec.rowHeight * spec.rows.length;
    const height = Math.ceil(tall + 34);
    const labels = picture(heat, left, height, "");
    labels.setAttribute("aria-hidden", "true");
    const everyRow = Math.ceil(13 / spec.rowHeight);
    spec.rows.forEach((name, row) => {
      if (row % everyRow) return;
      const text = draw(labels, "text", { x: left - 6, y: (row + 0.5) * spec.rowHeight + 4, "text-anchor": "end" }, clipped(name, left - 8));
      draw(text, "title", {}, name);
    });
    const scroll = add(heat, "div", { class: "cells" });
    const svg = picture(scroll, Math.floor(span), height, spec.label);
    if (spec.pick) svg.classList.add("pick");
    const edge = cell > 7 && spec.rowHeight > 7 ? 1 : 0;
    for (let row = 0; row < spec.rows.length; row += 1) {
      for (let column = 0; column < spec.columns.length; column += 1) {
        const value = spec.value(row, column);
        draw(svg, "rect", {
          x: (column * cell).toFixed(2), y: (row * spec.rowHeight).toFixed(2), width: (cell - edge + (edge ? 0 : 0.4)).toFixed(2),
          height: (spec.rowHeight - edge + (edge ? 0 : 0.4)).toFixed(2), fill: value === null ? "var(--none)" : spec.color(value),
        });
      }
    }
    const widest = Math.max(...spec.columns.map(textWidth)) + 8;
    const everyColumn = Math.max(1, Math.ceil(widest / cell));
    spec.columns.forEach((name, column) => {
      const x = spec.ticks ? column * cell : (column + 0.5) * cell;
      const fits = spec.ticks ? x + widest < span : true;
      if (column % everyColumn || !fits) return;
      draw(svg, "text", { x, y: tall + 14, "text-anchor": spec.ticks ? "start" : "middle" }, name);
    });
    draw(svg, "text", { x: Math.min(span, width - left) / 2, y: tall + 30, "text-anchor": "middle" }, spec.under);
    explore(scroll, svg, {
      columns: spec.columns.length, rows: spec.rows.length, text: spec.text, pick: spec.pick, label: spec.label,
      box: (column, row) => [column * cell, row * spec.rowHeight, cell, spec.rowHeight],
    });
    return { left, cell };
  }

  function scale(host, stops, low, high, fair = null) {
    host.textContent = "";
    add(host, "span", {}, low);
    const bar = add(host, "i");
    bar.style.background = `linear-gradient(to right, ${stops.map((stop) => `rgb(${stop.join()})`).join()})`;
    if (fair !== null) add(bar, "b").style.left = `${100 * fair}%`;
    add(host, "span", {}, high);
    if (fair !== null) add(host, "span", {}, `▏fair share 1/K = ${number(1 / experts)}`);
  }

  function legend(host, entries) {
    host.textContent = "";
    for (const [name, shape] of entries) {
      const item = add(host, "li");
      const svg = draw(item, "svg", { width: 22, height: 14, "aria-hidden": "true" });
      shape(svg);
      item.append(name);
    }
  }

  const names = (count, word) => Array.from({ length: count }, (_, i) => `${word}${i}`);

  function drawEntropy() {
    const host = byId("entropy");
    host.textContent = "";
    const width = host.clientWidth;
    const [left, top, bottom] = [30, 8, 40];
    const tall = 250;
    const step = (width - left - 6) / layers;
    const y = (value) => top + (1 - value) * tall;
    const label = "Entropy, balance and information of each layer";
    const svg = picture(host, width, top + tall + bottom, label);
    for (const value of [0, 0.25, 0.5, 0.75, 1]) {
      draw(svg, "line", { class: "grid", x1: left, x2: width, y1: y(value), y2: y(value) });
      draw(svg, "text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, value);
    }
    const radius = Math.max(2, Math.min(5.5, step / 3));
    const thick = Math.max(2, Math.min(9, step / 3));
    const every = Math.max(1, Math.ceil(20 / step));
    for (let i = 0; i < layers; i += 1) {
      const x = left + (i + 0.5) * step;
      const [low, high] = [data.entropy[i], data.balance[i]];
      draw(svg, "line", { x1: x, x2: x, y1: y(low), y2: y(high), stroke: "var(--gap)", "stroke-width": thick });
      if (data.classInformation) {
        const part = Math.min(data.classInformation[i], high - low);
        draw(svg, "line", { x1: x, x2: x, y1: y(high), y2: y(high - part), stroke: "var(--class)", "stroke-width": thick });
      }
      draw(svg, "circle", { cx: x, cy: y(high), r: radius, fill: "var(--card)", stroke: "var(--balance)", "stroke-width": 2 });
      draw(svg, "circle", { cx: x, cy: y(low), r: radius, fill: "var(--entropy)" });
      if (i % every === 0) draw(svg, "text", { x, y: top + tall + 19, "text-anchor": "middle" }, i);
    }
    draw(svg, "text", { x: left + (width - left) / 2, y: top + tall + 36, "text-anchor": "middle" }, "layer");
    legend(byId("entropy-legend"), [
      ["balance", (s) => draw(s, "circle", { cx: 11, cy: 7, r: 4.5, fill: "none", stroke: "var(--balance)", "stroke-width": 2 })],
      ["entropy", (s) => draw(s, "circle", { cx: 11, cy: 7, r: 5, fill: "var(--entropy)" })],
      ["information", (s) => draw(s, "rect", { x: 2, y: 3, width: 18, height: 8, fill: "var(--gap)" })],
      ...(data.classInformation ? [["of which class information", (s) => draw(s, "rect", { x: 2, y: 3, width: 18, height: 8, fill: "var(--class)" })]] : []),
    ]);
    explore(host, svg, {
      columns: layers, rows: 1, pick: (i) => choose(i), label,
      box: (i) => [left + i * step, top - 6, step, tall + 12],
      text: (i) => [
        `layer ${i}`, `balance ${number(data.balance[i])}`, `entropy ${number(data.entropy[i])}`, `information ${number(data.information[i])}`,
        ...(data.classInformation ? [`class information ${number(data.classInformation[i])}`] : []),
      ].join("\n"),
    });
    svg.classList.add("pick");
  }

  function drawImportance() {
    // limit the scale, so that a layer dominated by one expert doesn't make all others dark
    const largest = Math.max(...data.importance.flat()) * unit;
    const most = Math.min(largest, 4 / experts);
    scale(byId("importance-scale"), VIRIDIS, "0", most < largest ? `${number(most)} and more` : number(most), 1 / experts / most);
    heatMap(byId("importance"), {
      label: "Importance of each expert in each layer", rows: names(layers, "layer "), columns: names(experts, ""), under: "expert",
      rowHeight: Math.max(11, Math.min(46, 285 / layers)), least: 6,
      value: (row, column) => share(data.importance[row][column]),
      color: (value) => mix(VIRIDIS, value / most),
      text: (column, row) => {
        const value = share(data.importance[row][column]);
        return `layer ${row}, expert ${column}\nmean score ${number(value)}\n${toFair(value)}`;
      },
      pick: (column, row) => choose(row),
    });
  }

  function drawCurves() {
    if (!curves) return;
    byId("curves-card").hidden = false;
    const windows = curves.edges.length - 1;
    const rows = curves.importance[layer];
    const most = Math.max(...rows.flat()) * unit || 1;
    const steps = (i) => (curves.edges[i + 1] - curves.edges[i] === 1 ? `step ${curves.edges[i]}` : `steps ${curves.edges[i]} to ${curves.edges[i + 1] - 1}`);
    scale(byId("curves-scale"), VIRIDIS, "0", number(most), 1 / experts / most);
    const { left, cell } = heatMap(byId("curves"), {
      label: `Importance of the experts of layer ${layer} over steps`, rows: names(experts, "expert "),
      columns: curves.edges.slice(0, -1).map(String), under: "step", ticks: true,
      rowHeight: Math.max(4, Math.min(22, 320 / experts)), least: 1,
      value: (row, column) => share(rows[column][row]),
      color: (value) => mix(VIRIDIS, value / most),
      text: (column, row) => {
        const value = share(rows[column][row]);
        return `expert ${row}, ${steps(column)}\n${value === null ? "no sample counted" : `mean score ${number(value)}\n${toFair(value)}`}`;
      },
    });
    const host = byId("curves-entropy");
    host.textContent = "";
    const tall = 120;
    const heat = add(host, "div", { class: "heat" });
    const axis = picture(heat, left, tall + 20, "");
    axis.setAttribute("aria-hidden", "true");
    const y = (value) => 10 + (1 - value) * tall;
    for (const value of [0, 0.5, 1]) draw(axis, "text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value);
    const scroll = add(heat, "div", { class: "cells" });
    const label = `Entropy and balance of layer ${layer} over steps`;
    const svg = picture(scroll, Math.floor(cell * windows), tall + 20, label);
    for (const value of [0, 0.5, 1]) draw(svg, "line", { class: "grid", x1: 0, x2: cell * windows, y1: y(value), y2: y(value) });
    for (const name of ["balance", "entropy"]) {
      let path = "";
      curves[name][layer].forEach((value, i) => {
        if (value === null) return;
        const gap = i === 0 || curves[name][layer][i - 1] === null;
        path += `${gap ? "M" : "L"}${((i + 0.5) * cell).toFixed(2)} ${y(value).toFixed(2)}`;
      });
      draw(svg, "path", { d: path, fill: "none", stroke: `var(--${name})`, "stroke-width": 2, "stroke-dasharray": name === "balance" ? "6 3" : "none", "stroke-linejoin": "round" });
    }
    legend(byId("curves-legend"), [
      ["balance", (s) => draw(s, "line", { x1: 0, x2: 22, y1: 7, y2: 7, stroke: "var(--balance)", "stroke-width": 2, "stroke-dasharray": "6 3" })],
      ["entropy", (s) => draw(s, "line", { x1: 0, x2: 22, y1: 7, y2: 7, stroke: "var(--entropy)", "stroke-width": 2 })],
    ]);
    explore(scroll, svg, {
      columns: windows, rows: 1, label, box: (i) => [i * cell, 4, cell, tall + 12],
      text: (i) => {
        const value = curves.entropy[layer][i];
        return value === null ? `${steps(i)}\nno sample counted` : `${steps(i)}\nbalance ${number(curves.balance[layer][i])}\nentropy ${number(value)}`;
      },
    });
  }

  function drawClasses() {
    if (!classes) return;
    byId("classes-card").hidden = false;
    const rows = classes.scores[layer];
    const mean = data.importance[layer];
    const differs = view === "difference";
    const value = (row, column) => share(differs ? rows[row][column] - mean[column] : rows[row][column]);
    const most = Math.max(...rows.map((_, row) => Math.max(...mean.map((_, column) => Math.abs(value(row, column)))))) || 1;
    if (differs) scale(byId("classes-scale"), DIVERGING, `−${number(most)}`, `+${number(most)}`);
    else scale(byId("classes-scale"), VIRIDIS, "0", number(most), 1 / experts / most);
    heatMap(byId("classes"), {
      label: `Mean score of the experts of layer ${layer} by class`, rows: classes.names, columns: names(experts, ""), under: "expert",
      rowHeight: 22, least: 7, value,
      color: (v) => (differs ? mix(DIVERGING, 0.5 + v / most / 2) : mix(VIRIDIS, v / most)),
      text: (column, row) => {
        const own = share(rows[row][column]);
        const difference = own - share(mean[column]);
        const count = classes.counts[row];
        return `${classes.names[row]}, expert ${column}\nmean score ${number(own)}\nall samples ${number(share(mean[column]))} (${difference < 0 ? "−" : "+"}${number(Math.abs(difference))})\n${Number.isInteger(count) ? count : count.toFixed(1)} sample${count === 1 ? "" : "s"}`;
      },
    });
  }

  function favourites(expert) {
    if (!classes) return [];
    const mean = data.importance[layer][expert];
    const ratios = classes.scores[layer].map((row, i) => [classes.names[i], mean ? row[expert] / mean : 0]);
    return ratios.filter(([, ratio]) => ratio > 1.1).sort((a, b) => b[1] - a[1]).slice(0, 3);
  }

  function drawSamples() {
    const host = byId("experts");
    host.textContent = "";
    const shares = data.importance[layer];
    const order = shares.map((_, i) => i).sort((a, b) => shares[b] - shares[a]);
    const shown = all ? order : order.slice(0, FIRST_EXPERTS);
    const most = Math.max(...shares);
    for (const expert of shown) {
      const card = add(host, "article", { class: "expert" });
      const head = add(card, "h3", {}, `Expert ${expert}`);
      add(head, "span", {}, percent(share(shares[expert])));
      add(add(card, "div", { class: "share" }), "i").style.width = `${(100 * shares[expert]) / most}%`;
      const liked = favourites(expert).map(([name, ratio]) => `${name} (${ratio.toFixed(1)}×)`);
      if (classes) add(card, "p", { class: "likes" }, liked.length ? `more than usual: ${liked.join(", ")}` : "no class more than usual");
      const list = add(card, "ol");
      for (const [index, score] of data.top[layer][expert]) {
        const [id, text, uri] = samples[index];
        const item = add(list, "li", { title: `sample ${id}${text === null ? "" : `: ${text}`}\nscore ${number(score)}` });
        if (uri !== null) add(item, "img", { src: uri, alt: text === null ? `sample ${id}` : "" });
        if (text === null) add(item, "p", { class: "id" }, `sample ${id}`);
        else add(item, "p", {}, text);
        add(item, "data", { value: score }, score.toFixed(3));
      }
    }
    const more = byId("more");
    more.hidden = shown.length === order.length;
    more.textContent = `Show the other ${order.length - shown.length} experts`;
  }

  function choose(index) {
    const strip = byId("choices");
    const input = strip.querySelectorAll("input")[index];
    input.checked = true;
    strip.scrollLeft += input.getBoundingClientRect().left - strip.getBoundingClientRect().left - strip.clientWidth / 2;
    layer = index;
    drawLayer();
  }

  function drawLayer() {
    hideTip();
    for (const element of document.querySelectorAll(".layer")) element.textContent = layer;
    drawCurves();
    drawClasses();
    drawSamples();
  }

  document.querySelector(".pair").classList.toggle("wide", experts > 48);
  for (let i = 0; i < layers; i += 1) {
    const label = add(byId("choices"), "label");
    const input = add(label, "input", { type: "radio", name: "layer", value: i, "aria-label": `layer ${i}` });
    input.checked = i === 0;
    input.addEventListener("change", () => choose(i));
    add(label, "span", {}, i);
  }
  for (const input of document.querySelectorAll("input[name=view]")) {
    input.addEventListener("change", () => {
      view = input.value;
      drawClasses();
    });
  }
  byId("more").addEventListener("click", () => {
    all = true;
    drawSamples();
  });
  if (classes && !classes.names.length) byId("classes-card").hidden = true;
  addEventListener("scroll", hideTip, { passive: true });

  let drawn = 0;
  function drawAll() {
    const width = document.querySelector("main").clientWidth;
    if (width === drawn) return;
    drawn = width;
    drawEntropy();
    drawImportance();
    drawLayer();
  }
  drawAll();
  new ResizeObserver(drawAll).observe(document.querySelector("main"));
  // charts get the page's width when they are drawn, so redraw them for print
  for (const [event, paper] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(event, () => {
      document.body.classList.toggle("paper", paper);
      drawAll();
    });
  }
})();
