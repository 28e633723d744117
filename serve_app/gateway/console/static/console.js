// What a page does beside being read: logs in and out, sends forms to the endpoints below /v1 as
// JSON, draws charts, asks. Nothing that a model, a tool or a caller wrote becomes markup: every
// text goes in as text.
"use strict";

(() => {
  const find = (selector, root = document) => root.querySelector(selector);

  function say(text, isError = false) {
    const status = find("#status");
    status.textContent = text;
    status.className = isError ? "error" : "";
  }

  async function send(method, path, body, options = {}) {
    const headers = { ...(options.headers ?? {}) };
    if (body !== undefined) headers["content-type"] = "application/json";
    const response = await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: options.signal,
    });
    if (response.ok) return response;
    let message = `${response.status} ${response.statusText}`;
    try {
      message = (await response.json()).error.message;
    } catch {
      // not one of our errors: the status has to do
    }
    throw new Error(message);
  }

  // An element with attributes and children; a string is a text node.
  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function drawn(name, attributes, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  // Sessions.

  async function logIn(form) {
    const key = find("#key", form).value.trim();
    await send("POST", "/console/session", {}, { headers: { authorization: `Bearer ${key}` } });
    location.reload();
  }

  async function logOut() {
    await send("DELETE", "/console/session");
    location.assign("/console");
  }

  // Forms that change something.

  function valueOf(input) {
    // What was seen last counts where a page goes on changing.
    if (input.dataset.live) return Number(find(input.dataset.live).value);
    if (input.type === "checkbox") return input.checked ? true : undefined;
    if (input.value === "") return undefined;
    return input.type === "number" ? Number(input.value) : input.value;
  }

  function bodyOf(form) {
    if (form.dataset.json) return JSON.parse(form.elements[form.dataset.json].value);
    const body = form.dataset.kind ? { kind: form.dataset.kind } : {};
    for (const input of form.elements) {
      const value = input.name ? valueOf(input) : undefined;
      if (value !== undefined) body[input.name] = value;
    }
    return body;
  }

  async function act(form) {
    const body = bodyOf(form);
    const path = form.dataset.path.replace(/\{(\w+)\}/g, (_, name) => {
      const value = body[name];
      delete body[name];
      return encodeURIComponent(value);
    });
    await send(form.dataset.method, path, form.dataset.method === "DELETE" ? undefined : body);
    say(form.dataset.done);
    const live = find("#live");
    if (live) htmx.ajax("GET", location.href, { target: "#live", select: "#live", swap: "outerHTML" });
  }

  // Decisions.

  function number(value, places = 3) {
    return typeof value === "number" ? value.toFixed(places) : "-";
  }

  function interval(low, middle, high) {
    const x = (value) => (100 * value).toFixed(2);
    return drawn(
      "svg",
      { class: "interval", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      drawn("rect", { class: "range", x: x(low), y: 3, width: x(high - low), height: 4 }),
      drawn("rect", { class: "middle", x: x(middle - 0.0075), y: 0, width: 1.5, height: 10 }),
    );
  }

  function row(name, ...cells) {
    return make("tr", {}, make("th", { scope: "row" }, name), ...cells);
  }

  function table(label, heads, rows) {
    const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)));
    return make(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
      make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)),
    );
  }

  function showDecision(place, decision) {
    const facts = [
      ["Candidate", decision.pair],
      ["Decided by", decision.path],
      ["Confidence", number(decision.confidence)],
      ["Propensity", number(decision.propensity)],
      ["Policy, pool", `${decision.policy_version}, ${decision.pool_version}`],
      ["Unlike the profile", number(decision.distance_quantile)],
    ];
    const figures = make("dl", { class: "figures" });
    for (const [name, value] of facts) {
      figures.append(make("div", { class: "figure" }, make("dt", {}, name), make("dd", {}, String(value))));
    }
    const rows = decision.candidates.map((one) =>
      row(
        one.pair,
        make("td", { class: "number" }, number(one.utility)),
        make("td", {}, interval(one.quality_low, one.quality, one.quality_high), ` ${number(one.quality)}`),
        make("td", {}, `${number(one.quality_low)} to ${number(one.quality_high)}`),
        make("td", { class: "number" }, `$${number(one.cost_usd, 6)}`),
      ),
    );
    place.replaceChildren(
      figures,
      table("Candidates", ["Candidate", "Utility", "Expected score", "95% interval", "Expected dollars"], rows),
    );
    if (decision.cluster) {
      const examples = decision.cluster.examples.map((text) => make("li", {}, text));
      place.append(make("h3", {}, `Like these profiled questions (cluster ${decision.cluster.index})`));
      place.append(make("ul", {}, ...examples));
    }
  }

  async function routeAgain(form) {
    const response = await send("POST", "/v1/route", JSON.parse(form.dataset.body));
    showDecision(find("#decision"), await response.json());
  }

  // The playground.

  let asking = null;

  async function* eventsOf(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let waiting = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      waiting += value;
      const events = waiting.split("\n\n");
      waiting = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        if (!data.startsWith(":")) yield JSON.parse(data);
      }
    }
  }

  function showAnswered(extension) {
    const place = find("#decision");
    if (extension.decision) showDecision(place, extension.decision);
    const rows = extension.steps.map((step) =>
      row(
        step.pair,
        make("td", {}, step.error ?? "answered"),
        make("td", {}, step.tool_calls.map((call) => call.function ?? call.tool_id).join(", ")),
        make("td", { class: "number" }, `${number(step.seconds, 2)} s`),
        make("td", { class: "number" }, `$${number(step.cost_usd, 6)}`),
      ),
    );
    place.append(make("h3", {}, "What was done"));
    place.append(table("Steps", ["Step", "Came to", "Tools", "Took", "Dollars"], rows));
    const path = `/console/requests/${encodeURIComponent(extension.request_id)}`;
    place.append(make("p", {}, make("a", { href: path }, "All that happened")));
    const rating = find("#rating");
    rating.dataset.requestId = extension.request_id;
    rating.hidden = false;
  }

  async function ask(form) {
    const answer = find("#answer");
    const atlas = { explain: true };
    const [alpha, dollars] = [find("#alpha").value, find("#max-usd").value];
    if (alpha !== "") atlas.alpha = Number(alpha);
    if (dollars !== "") atlas.max_cost_usd = Number(dollars);
    const content = find("#question").value;
    const messages = [{ role: "user", content }];
    const body = { model: find("#model").value, messages, stream: true, atlas };
    asking = new AbortController();
    answer.textContent = "";
    answer.setAttribute("aria-busy", "true");
    find("#decision").replaceChildren();
    find("#rating").hidden = true;
    find("#stop").disabled = false;
    try {
      const response = await send("POST", "/v1/chat/completions", body, { signal: asking.signal });
      for await (const event of eventsOf(response)) {
        if (event.error) throw new Error(event.error.message);
        answer.append(event.choices?.[0]?.delta?.content ?? "");
        if (event.atlas?.steps) showAnswered(event.atlas);
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    } finally {
      answer.setAttribute("aria-busy", "false");
      find("#stop").disabled = true;
    }
  }

  async function rate(button) {
    const rating = button.closest("#rating");
    const body = { request_id: rating.dataset.requestId, score: Number(button.dataset.score) };
    await send("POST", "/v1/feedback", body);
    rating.hidden = true;
    say("The verdict is kept.");
  }

  // Charts.

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function policyLines(lines) {
    return (plot) => {
      const { ctx, bbox } = plot;
      ctx.save();
      ctx.strokeStyle = ctx.fillStyle = colour("--quiet");
      ctx.setLineDash([4, 4]);
      for (const line of lines) {
        const x = plot.valToPos(line.at, "x", true);
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
        const isLeft = x < bbox.left + bbox.width / 2;
        ctx.textAlign = isLeft ? "left" : "right";
        ctx.textBaseline = "top";
        ctx.fillText(line.label, isLeft ? x + 4 : x - 4, bbox.top);
      }
      ctx.restore();
    };
  }

  function shownIn(unit) {
    return (value) => {
      if (value === null || value === undefined) return "-";
      const digits = String(Number(value.toPrecision(3)));
      return unit === "$" ? `$${digits}` : `${digits}${unit}`;
    };
  }

  // The axis along which a chart goes: time, or what it names in `x`.
  function alongOf(chart) {
    if (!chart.x) return { scale: {}, axis: {}, series: { value: "{YYYY}-{MM}-{DD} {HH}:{mm}" } };
    const shown = shownIn(chart.x.unit);
    const marked = (_, values) => values.map((value) => (value === null ? "" : shown(value)));
    return {
      scale: { time: false, distr: chart.x.is_log ? 3 : 1 },
      axis: { values: marked },
      series: { label: chart.x.label, value: (_, value) => shown(value) },
    };
  }

  function draw(place) {
    const chart = JSON.parse(place.dataset.chart);
    const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 } };
    const shown = shownIn(chart.unit);
    const along = alongOf(chart);
    const fromZero = (_, low, high) => [0, high > 0 ? high * 1.1 : 1];
    const around = (_, low, high) => (low === null ? [0, 1] : uPlot.rangeNum(low, high, 0.1, true));
    const series = chart.series.map((one, index) => ({
      label: one.label,
      stroke: colour(`--series-${(index % 6) + 1}`),
      width: 2,
      dash: index ? [6, 3] : undefined,
      spanGaps: Boolean(chart.x),
      paths: one.is_scattered ? () => null : undefined,
      points: one.is_scattered ? { show: true, size: 7 } : undefined,
      value: (_, value) => shown(value),
    }));
    const options = {
      width: place.clientWidth,
      height: 190,
      scales: { x: along.scale, y: { range: chart.x ? around : fromZero } },
      axes: [
        { ...axis, ...along.axis },
        { ...axis, size: 60, values: (_, values) => values.map(shown) },
      ],
      series: [along.series, ...series],
      hooks: { draw: [policyLines(chart.lines)] },
    };
    const values = [chart.times, ...chart.series.map((one) => one.values)];
    const plot = new uPlot(options, values, place);
    new ResizeObserver(() => plot.setSize({ width: place.clientWidth, height: 190 })).observe(place);
  }

  function drawAll(root) {
    for (const place of root.querySelectorAll("[data-chart]")) if (!place.firstChild) draw(place);
  }

  // Events.

  async function doing(work) {
    try {
      await work();
    } catch (error) {
      say(error.message, true);
    }
  }

  const forms = { "log-in": logIn, "route-again": routeAgain, ask };

  document.addEventListener("submit", (event) => {
    const form = event.target;
    const work = forms[form.id] ?? (form.dataset.path ? act : null);
    if (!work) return;
    event.preventDefault();
    const buttons = form.querySelectorAll("button:not([type])");
    for (const button of buttons) button.disabled = true;
    doing(() => work(form)).finally(() => {
      for (const button of buttons) button.disabled = false;
    });
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.id === "log-out") doing(logOut);
    if (button.id === "stop") asking?.abort();
    if (button.dataset.score) doing(() => rate(button));
  });

  document.addEventListener("htmx:responseError", (event) => {
    if (event.detail.xhr.status === 401) location.reload();
    else say(`The page could not be read anew: ${event.detail.xhr.status}`, true);
  });
  document.addEventListener("htmx:afterSwap", () => drawAll(document));
  document.addEventListener("DOMContentLoaded", () => drawAll(document));
})();
