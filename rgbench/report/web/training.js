"use strict";
// Along training: one slider moves the values, the spectra and the images of every run together.
for (const box of document.querySelectorAll(".training")) {
  const data = DATA.worlds[box.dataset.world].training;
  const slider = box.querySelector("input[type=range]");
  const charts = box.querySelector(".charts");
  slider.max = data.steps.length - 1;
  box.querySelector(".grid").classList.toggle("alone", data.runs.length === 1);
  const name = `${box.dataset.world}.step`;
  slider.value = VIEW.has(name) ? data.steps.indexOf(Number(VIEW.get(name))) : slider.max;

  const show = () => {
    const at = Number(slider.value);
    const step = data.steps[at];
    box.querySelector("output").textContent = `step ${step} of ${data.of}`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    charts.replaceChildren(
      ...data.metrics.map((metric, j) => valuesChart(data, metric, j, at)),
      ...(data.radius.length ? [gapsChart(data, at)] : []),
    );
    valuesTable(box.querySelector("table"), data, at);
    box.querySelector(".grid").replaceChildren(
      ...data.prompts.map((prompt, i) =>
        line(
          prompt.text,
          `${prompt.id}, seed ${prompt.seed}`,
          data.runs.map((run) => ({
            src: run.images[at] ? picture(run.images[at][i]) : "",
            model: { method: run.method, name: run.name, about: `${run.model}; ${run.images[at] ? `step ${step}` : "not evaluated here"}` },
            alt: `${run.model} at step ${step}: ${prompt.text}`,
          })),
        ),
      ),
    );
  };

  const move = (by) => {
    slider.value = Number(slider.value) + by;
    moved();
  };
  const moved = () => {
    show();
    keep(name, String(data.steps[Number(slider.value)]));
  };
  slider.addEventListener("input", moved);
  box.querySelector(".earlier").addEventListener("click", () => move(-1));
  box.querySelector(".later").addEventListener("click", () => move(1));
  show();
}

function heading(metric) {
  return metric.unit ? `${metric.label} (${metric.unit})` : metric.label;
}

function valuesTable(table, data, at) {
  const head = node("tr");
  head.append(node("th", "", "Run"), ...data.metrics.map((metric) => node("th", "num", heading(metric))));
  const rows = data.runs.map((run) => {
    const row = node("tr");
    const name = node("th");
    name.append(node("span", `m m-${run.method}`, run.name), " ", node("span", "sub id", run.model));
    row.append(name, ...data.metrics.map((metric, j) => node("td", "num", run.values[j][at] ? run.values[j][at][3] : "—")));
    return row;
  });
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(...rows);
}

// A metric by step, with each run's interval, hack step (triangle) and the slider's place.
function valuesChart(data, metric, j, at) {
  const lines = data.runs.map((run) => ({
    run,
    points: data.steps.flatMap((step, i) => (run.values[j][i] ? [[step, ...run.values[j][i]]] : [])),
  }));
  const values = lines.flatMap(({ points }) => points.flatMap(([, ...ends]) => ends.filter((end) => typeof end === "number")));
  const chart = frame(`${heading(metric)} by optimiser step`, [data.steps[0], data.steps[data.steps.length - 1]], range(values));
  const x = chart.x(data.steps[at]);
  chart.svg.append(shape("line", { class: "cursor", x1: x, x2: x, y1: chart.top, y2: chart.bottom }));
  for (const { run, points } of lines) {
    const band = points.filter(([, , low, high]) => low !== null && high !== null);
    if (band.length > 1) {
      const edge = [...band.map(([s, , , high]) => [s, high]), ...band.map(([s, , low]) => [s, low]).reverse()];
      chart.svg.append(shape("polygon", { class: `band s-${run.method}`, points: edge.map(chart.place).join(" ") }));
    }
    chart.svg.append(shape("polyline", { class: `series s-${run.method}`, points: points.map(chart.place).join(" ") }));
    const here = points.find(([step]) => step === data.steps[at]);
    if (here) chart.svg.append(shape("circle", { class: `dot s-${run.method}`, cx: chart.x(here[0]), cy: chart.y(here[1]), r: 4.5 }));
    const peak = run.hack && j === 1 && points.find(([step]) => step === run.hack.step);
    if (peak) chart.svg.append(...hackMark(chart, run.hack, chart.y(peak[1]) - 8));
  }
  return chart.figure;
}

// A triangle at the peak, and a bar over the steps that are not clearly worse than it.
function hackMark(chart, hack, y) {
  const mark = shape("path", { class: "hack", d: `M${chart.x(hack.step)} ${y} l-6 -9 h12 z` });
  mark.append(shape("title", {}, `hack step ${hack.step}: gold peaks here while the trained reward still rises`));
  const bar = { class: "hack", x1: chart.x(hack.first), x2: chart.x(hack.end), y1: y - 9, y2: y - 9 };
  return [mark, shape("line", bar)];
}

// Each run's spectrum at the slider's step, in dB against real; the scale is that of all steps.
function gapsChart(data, at) {
  const all = data.runs.flatMap((run) => run.gaps.flatMap((gap) => gap || []));
  const chart = frame("Spectrum, gap to real (dB) by cycles/pixel", [0, 0.5], range([...all, 0]));
  chart.svg.append(shape("line", { class: "zero", x1: chart.left, x2: chart.right, y1: chart.y(0), y2: chart.y(0) }));
  for (const run of data.runs) {
    const gap = run.gaps[at];
    if (!gap) continue;
    const points = gap.map((value, i) => chart.place([data.radius[i], value]));
    chart.svg.append(shape("polyline", { class: `series s-${run.method}`, points: points.join(" ") }));
  }
  return chart.figure;
}

function range(values) {
  const [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
  const room = (high - low) * 0.07 || 0.5;
  return [low - room, high + room];
}

function frame(title, [xLow, xHigh], [yLow, yHigh]) {
  const [left, right, top, bottom] = [46, 350, 10, 190];
  const figure = node("figure", "chart");
  figure.append(node("figcaption", "", title));
  const svg = shape("svg", { viewBox: "0 0 370 214", role: "img", "aria-label": title });
  const x = (value) => left + ((value - xLow) / (xHigh - xLow || 1)) * (right - left);
  const y = (value) => bottom - ((value - yLow) / (yHigh - yLow)) * (bottom - top);
  for (const tick of ticks(yLow, yHigh)) {
    svg.append(
      shape("line", { class: "rule", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
      shape("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, String(tick)),
    );
  }
  for (const tick of ticks(xLow, xHigh)) svg.append(shape("text", { x: x(tick), y: bottom + 17, "text-anchor": "middle" }, String(tick)));
  figure.append(svg);
  return { figure, svg, x, y, left, right, top, bottom, place: ([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}` };
}

// About four round numbers between two ends.
function ticks(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough) || 10);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(10)));
  return found;
}
