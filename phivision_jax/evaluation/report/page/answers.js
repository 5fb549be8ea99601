"use strict";
// The list of answers of a report: filters, pages, details with boxes. data/index.js calls evaluation.index with a few
// values of every row, data/rows-N.js calls evaluation.rows with everything about the rows of a chunk. The state of the
// list is in the address, so that each view and each item has a link. All texts are set as text, never as HTML.

(() => {
  const PAGE = 50; // rows shown at a time
  const CHUNKS = 12; // chunks kept in memory
  const ERROR = 1, UNPARSED = 2, LENGTH = 4, JUDGED = 8; // as in rows.py
  const TAKEN = ["no reply", "thought", "did not think"];
  const COLOURS = { reference: "#1a9641", answer: "#e0322f", scored: "#1769e0" };
  const NAMES = { reference: "reference", answer: "answer", scored: "as scored" };
  const RESULTS = {
    other: ["not correct", (i) => column.value[i] < 1],
    "": ["all", () => true],
    correct: ["correct", (i) => column.value[i] === 1],
    partly: ["partly correct", (i) => column.value[i] > 0 && column.value[i] < 1],
    wrong: ["incorrect", (i) => column.value[i] === 0 && !(column.flags[i] & ERROR)],
    unparsed: ["unparsed", (i) => column.flags[i] & UNPARSED],
    length: ["cut off at the limit", (i) => column.flags[i] & LENGTH],
    error: ["failed", (i) => column.flags[i] & ERROR],
    judged: ["scored by a judge", (i) => column.flags[i] & JUDGED],
  };
  const CHANGES = {
    "": ["all", () => true],
    gained: ["gained", (i) => column.other[i] !== null && column.value[i] > column.other[i]],
    lost: ["lost", (i) => column.other[i] !== null && column.value[i] < column.other[i]],
    equal: ["equal", (i) => column.value[i] === column.other[i]],
  };

  let index, column, shown = [], current = 0, searches = 0;
  const chunks = new Map(), waiting = new Map();

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  // ---- chunks

  function chunkOf(row) {
    let low = 0, high = index.starts.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (index.starts[middle] <= row) low = middle; else high = middle - 1;
    }
    return low;
  }

  function load(number) {
    if (chunks.has(number)) return Promise.resolve(chunks.get(number));
    if (!waiting.has(number)) {
      const wait = {};
      wait.promise = new Promise((resolve, reject) => Object.assign(wait, { resolve, reject }));
      waiting.set(number, wait);
      const script = element("script", { src: `data/rows-${number}.js` });
      script.onload = () => script.remove();
      script.onerror = () => { waiting.delete(number); wait.reject(new Error(`data/rows-${number}.js is missing`)); };
      document.head.append(script);
    }
    return waiting.get(number).promise;
  }

  function rowsLoaded(number, rows) {
    chunks.set(number, rows);
    if (chunks.size > CHUNKS) chunks.delete(chunks.keys().next().value);
    waiting.get(number)?.resolve(rows);
    waiting.delete(number);
  }

  async function everything(row) {
    const number = chunkOf(row), rows = await load(number);
    return rows[row - index.starts[number]];
  }

  // ---- the state, in the address

  const state = () => new URLSearchParams(location.hash.slice(1));
  const keyOf = (row) => [index.benchmarks[column.benchmark[row]], index.modes[column.mode[row]], column.item[row]].join("/");

  function addressOf(changes) {
    const values = state();
    for (const [name, value] of Object.entries(changes)) {
      if (value === null) values.delete(name); else values.set(name, value);
    }
    return `#${values}`;
  }

  function go(changes) {
    history.replaceState(null, "", addressOf(changes));
    show();
  }

  // ---- the list

  const list = element("ol", { className: "rows" }), pages = element("nav", { className: "pages" });
  const status = element("p", { className: "status", role: "status" });
  const filters = {}, search = element("input", { type: "search", placeholder: "Search all texts" });

  function choose(name, label, options) {
    const select = element("select", {}, ...Object.entries(options).map(([value, text]) => element("option", { value }, text)));
    select.onchange = () => go({ [name]: select.value, page: null, item: null });
    select.dataset.filter = name;
    filters[name] = select;
    return element("label", {}, label, select);
  }

  function build() {
    const numbered = (names) => ({ "": "all", ...Object.fromEntries(names.map((name, i) => [`${i}`, name])) });
    const texts = (table) => Object.fromEntries(Object.entries(table).map(([value, [text]]) => [value, text]));
    const form = element("form", { className: "filters" },
      choose("benchmark", "Benchmark", numbered(index.titles)),
      choose("mode", "Mode", numbered(index.modes)),
      choose("taken", "Reply", numbered(TAKEN)),
      choose("result", "Result", { other: RESULTS.other[0], ...texts(RESULTS) }));
    if (column.other) form.append(choose("change", "Against the other run", texts(CHANGES)));
    form.append(element("label", { className: "search" }, "Text", search));
    form.onsubmit = (event) => event.preventDefault();
    let timer;
    search.oninput = () => {
      clearTimeout(timer);
      timer = setTimeout(() => go({ text: search.value || null, page: null, item: null }), 250);
    };
    document.querySelector("#answers").append(form, status, list, pages);
    const browse = element("button", { id: "browse", type: "button" }, `Browse ${column.value.length.toLocaleString("en")} answers`);
    browse.onclick = () => form.scrollIntoView();
    document.querySelector("h1").after(browse);
  }

  function filtered() {
    const values = state();
    for (const [name, select] of Object.entries(filters)) select.value = values.get(name) ?? (name === "result" ? "other" : "");
    if (document.activeElement !== search) search.value = values.get("text") ?? "";
    const result = (RESULTS[filters.result.value] ?? RESULTS[""])[1];
    const change = filters.change ? (CHANGES[filters.change.value] ?? CHANGES[""])[1] : CHANGES[""][1];
    const equal = ["benchmark", "mode", "taken"].filter((name) => filters[name].value !== "")
      .map((name) => [column[name], Number(filters[name].value)]);
    const rows = [];
    for (let i = 0; i < column.value.length; i++) {
      if (equal.every(([numbers, value]) => numbers[i] === value) && result(i) && change(i)) rows.push(i);
    }
    return rows;
  }

  async function matching(rows, text, isCurrent) {
    const wanted = text.toLocaleLowerCase(), found = [];
    let last = -1;
    for (const row of rows) {
      const number = chunkOf(row);
      if (number !== last) status.textContent = `Searching ${row.toLocaleString("en")} of ${column.value.length.toLocaleString("en")} …`;
      last = number;
      const all = await everything(row);
      if (!isCurrent()) return null;
      const texts = [column.item[row], all.question, all.thought, all.answer, all.record, all.error, all.reason];
      if (texts.some((part) => part.toLocaleLowerCase().includes(wanted))) found.push(row);
    }
    return found;
  }

  async function show() {
    const mine = ++searches, isCurrent = () => mine === searches, values = state();
    let rows = filtered();
    try {
      if (values.get("text")) rows = await matching(rows, values.get("text"), isCurrent);
      if (rows === null || !isCurrent()) return;
      shown = rows;
      const open = find(values.get("item"));
      if (open !== null && !rows.includes(open)) { // a link to an item shows it, whatever the filters are
        history.replaceState(null, "", `#${new URLSearchParams({ result: "", item: values.get("item") })}`);
        search.value = "";
        show();
        return;
      }
      draw(open, values);
    } catch (error) {
      status.textContent = error.message;
    }
  }

  function find(key) {
    if (key === null) return null;
    for (let i = 0; i < column.item.length; i++) if (keyOf(i) === key) return i;
    status.textContent = `There is no item ${key}.`;
    return null;
  }

  function draw(open, values) {
    const last = Math.max(Math.ceil(shown.length / PAGE) - 1, 0);
    const wanted = open === null ? Number(values.get("page") ?? 1) - 1 : Math.floor(shown.indexOf(open) / PAGE);
    const page = current = Math.min(Math.max(Number.isInteger(wanted) ? wanted : 0, 0), last);
    list.replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map((row) => line(row, row === open)));
    const count = `${shown.length.toLocaleString("en")} of ${column.value.length.toLocaleString("en")} answers`;
    status.textContent = last ? `${count}, page ${(page + 1).toLocaleString("en")} of ${(last + 1).toLocaleString("en")}` : count;
    const turn = (text, to) => element("button",
      { type: "button", disabled: to < 0 || to > last, onclick: () => go({ page: to + 1, item: null }) }, text);
    pages.replaceChildren(turn("First", page ? 0 : -1), turn("Previous", page - 1), turn("Next", page + 1), turn("Last", page < last ? last : -1));
    pages.hidden = !last;
  }

  function verdict(value, flags = 0) {
    if (flags & ERROR) return element("span", { className: "verdict bad", title: "the request or its judge failed" }, "!");
    const text = value === 1 ? "✓" : value === 0 ? "✗" : value.toFixed(2);
    return element("span", { className: `verdict ${value === 1 ? "right" : value === 0 ? "bad" : "half"}`, title: `score ${value}` }, text);
  }

  function line(row, open) {
    const mode = index.modes[column.mode[row]], taken = column.taken[row];
    const cells = [
      ["benchmark", index.titles[column.benchmark[row]]],
      ["mode", mode === "auto" && taken ? `auto: ${["", "think", "nothink"][taken]}` : mode],
      ["item", column.item[row]],
      ["question", column.question[row]],
      ["answer", column.answer[row] || "(no answer)"],
      ["reference", column.reference[row]],
      ["tokens", `${column.tokens[row].toLocaleString("en")} tokens`],
    ].map(([name, text]) => element("span", { className: name, title: text, dir: "auto" }, text));
    const link = element("a", { className: "row", href: addressOf(open ? { item: null, page: current + 1 } : { item: keyOf(row), page: null }) });
    link.append(verdict(column.value[row], column.flags[row]), ...cells);
    link.setAttribute("aria-expanded", open);
    const item = element("li", { className: open ? "open" : "" }, link);
    if (open) everything(row).then((all) => {
      item.append(detail(row, all));
      item.scrollIntoView({ block: "start" });
    }, (error) => item.append(element("p", { className: "bad" }, error.message)));
    return item;
  }

  // ---- one item

  function detail(row, all) {
    const part = (title, text, more = {}) => text ? [element("h3", {}, title), element("p", { className: "long", dir: "auto", ...more }, text)] : [];
    const texts = element("div", { className: "texts" }, ...part("Question", all.question));
    if (all.thought) {
      const heading = `Thought, ${all.tokens[2].toLocaleString("en")} tokens`;
      texts.append(element("details", { className: "thought" }, element("summary", {}, heading), element("p", { className: "long", dir: "auto" }, all.thought)));
    }
    texts.append(...part("Answer", all.finish === "error" ? "" : all.answer || "(no answer)"), ...part("Failure", all.error, { className: "long bad" }));
    texts.append(...part("Reference", all.reference));
    const understood = all.extracted === null ? "nothing understood" : `understood: ${all.extracted}`;
    const judged = all.judge ? `judge: ${all.judge}` : "rule only, no judge";
    texts.append(...part("Score", `${column.value[row]} · ${understood} · ${all.reason} · ${judged}`));
    if (all.other) {
      const other = all.other.extracted === null ? "nothing understood" : `understood: ${all.other.extracted}`;
      texts.append(...part("The other run", `${all.other.error || all.other.answer || "(no answer)"}\n${all.other.value} · ${other} · ${all.other.reason}`));
    }
    texts.append(modes(row), element("p", { className: "numbers" }, facts(all)));
    if (all.record !== all.reference) texts.append(element("details", {}, element("summary", {}, "Record"), element("p", { className: "long" }, all.record)));
    return element("article", { className: "detail" }, images(all), texts);
  }

  function facts(all) {
    const [prompt, image, thought, answer] = all.tokens, [queue, prefill, decode] = all.seconds;
    const found = [`finished by ${all.finish}`, `prompt ${prompt} tokens, ${image} of images`, `thought ${thought}, answer ${answer} tokens`,
      `waiting ${queue} s, prefill ${prefill} s, decoding ${decode} s${all.cached ? ", from the cache" : ""}`];
    if (all.groups) found.push(all.groups);
    if (all.cluster) found.push(`cluster ${all.cluster}`);
    return found.join(" · ");
  }

  function modes(row) {
    const same = [];
    for (const step of [-1, 1]) { // the modes of an item are neighbours
      for (let i = row + step; i >= 0 && i < column.item.length && Math.abs(i - row) < index.modes.length; i += step) {
        if (column.item[i] === column.item[row] && column.benchmark[i] === column.benchmark[row]) same.push(i);
      }
    }
    const links = [row, ...same].sort((a, b) => a - b).map((i) => {
      const link = element(i === row ? "b" : "a", {}, verdict(column.value[i], column.flags[i]), ` ${index.modes[column.mode[i]]}`);
      if (i !== row) link.href = `#${new URLSearchParams({ result: "", item: keyOf(i) })}`;
      return link;
    });
    const own = element("a", { href: `#${new URLSearchParams({ item: keyOf(row) })}` }, "link to this item");
    return element("p", { className: "modes" }, ...links, own);
  }

  function images(all) {
    const figures = all.images.map((name, i) => {
      const image = element("img", { src: `images/${encodeURIComponent(name)}`, alt: `Image ${i + 1} of the question` });
      const frame = element("div", { className: "frame" }, image);
      if (i === all.images.length - 1) frame.append(...all.marks.map(mark));
      return frame;
    });
    const kinds = all.images.length ? [...new Set(all.marks.map((each) => each.kind))] : [];
    const legend = kinds.map((kind) => {
      const swatch = element("i", { className: "swatch" });
      swatch.style.background = COLOURS[kind];
      return element("span", {}, swatch, NAMES[kind]);
    });
    return element("div", { className: "images", hidden: !figures.length }, ...figures, element("p", { className: "legend" }, ...legend));
  }

  function mark({ kind, xy, label }) {
    const [x, y, right, bottom] = xy, box = element("i", { className: `mark ${kind}`, title: label || NAMES[kind] });
    box.style.borderColor = COLOURS[kind];
    box.style.left = `${100 * x}%`;
    box.style.top = `${100 * y}%`;
    if (xy.length === 2) box.classList.add("point");
    else {
      box.style.width = `${100 * (right - x)}%`;
      box.style.height = `${100 * (bottom - y)}%`;
    }
    return box;
  }

  window.evaluation = {
    index(data) {
      index = data;
      column = data.columns;
      build();
      addEventListener("hashchange", show);
      show();
    },
    rows: rowsLoaded,
  };
})();
