// One page over /v1/chat/completions: images, modes, streaming, boxes. No state outlives the tab.

const $ = (selector, within = document) => within.querySelector(selector);
const COLOURS = ["#e0322f", "#1769e0", "#1a9641", "#b86a00", "#8e3fbf", "#007f8a", "#d6338a", "#8a6d1b"];
const TOLERANCE = 0.02; // numbers this far outside [0, 1] are clipped, as rounding may cause them

let history = []; // messages as the API takes them
let images = []; // data URIs for the next question
let running = null; // an AbortController while an answer streams

// ---- images of the next question

function readImages(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    reader.onload = () => { images.push(reader.result); showImages(); };
    reader.readAsDataURL(file);
  }
}

function showImages() {
  $("#images").replaceChildren(...images.map((uri, i) => {
    const item = document.createElement("li"), remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove image ${i + 1}`);
    remove.onclick = () => { images.splice(i, 1); showImages(); $("#question").focus(); };
    item.append(picture(uri, `Image ${i + 1}`), remove);
    return item;
  }));
}

function picture(uri, alt) {
  const image = new Image();
  image.src = uri;
  image.alt = alt;
  return image;
}

// ---- boxes and points, as phivision_jax/inference/grounding.py finds them

function findMarks(text) {
  const marks = [];
  for (const match of text.matchAll(/\[([^\][]*)\]/g)) {
    const parts = match[1].split(","), shares = parts.map(Number);
    const numbers = parts.every((part) => part.trim() !== "") && shares.every(Number.isFinite);
    const inside = numbers && shares.every((share) => -TOLERANCE <= share && share <= 1 + TOLERANCE);
    const box = shares.length === 4 && shares[0] <= shares[2] && shares[1] <= shares[3];
    const point = shares.length === 2 && match[1].includes(".");
    if (!inside || !(box || point)) continue;
    const end = match.index + match[0].length, line = text.lastIndexOf("\n", match.index) + 1;
    const before = text.slice(Math.max(marks.at(-1)?.end ?? 0, line), match.index);
    marks.push({ xy: shares.map((share) => Math.min(Math.max(share, 0), 1)), start: match.index, end, label: label(before) });
  }
  return marks;
}

function label(before) {
  const found = before.replace(/<\/?[\w|]+>/g, "").replace(/^(?:[^\p{L}\p{N}]|\d+[.)]|(?:and|or)(?!\p{L}))+|[^\p{L}\p{N}]+$/gu, "");
  return found.length <= 40 && found.split(/\s+/).length <= 6 && !before.includes("{") ? found : "";
}

function showMarks(turn, text, uri) {
  const marks = findMarks(text), answer = $(".answer", turn), figure = $(".marked", turn);
  answer.replaceChildren();
  let end = 0;
  marks.forEach((mark, i) => {
    const part = document.createElement("mark");
    part.style.textDecorationColor = COLOURS[i % COLOURS.length];
    part.textContent = text.slice(mark.start, mark.end);
    answer.append(text.slice(end, mark.start), part);
    end = mark.end;
  });
  answer.append(text.slice(end));
  if (!uri || !marks.length) return;
  figure.hidden = false;
  if ($("img", figure).src !== uri) $("img", figure).src = uri;
  for (const [i, mark] of marks.entries()) {
    if (figure.children.length > i + 1) continue; // the marks of a beginning are the first marks of the text
    const shape = document.createElement("i"), name = document.createElement("b"), [x, y, right, bottom] = mark.xy;
    shape.style.left = `${100 * x}%`;
    shape.style.top = `${100 * y}%`;
    shape.style.borderColor = name.style.background = COLOURS[i % COLOURS.length];
    if (right === undefined) shape.className = "point";
    else {
      shape.style.width = `${100 * (right - x)}%`;
      shape.style.height = `${100 * (bottom - y)}%`;
    }
    name.textContent = mark.label || `${i + 1}`;
    name.classList.toggle("inside", y < 0.1);
    name.classList.toggle("end", x > 0.6);
    shape.append(name);
    figure.append(shape);
  }
}

// ---- one question and its answer

async function ask(question) {
  const turn = $("#turn").content.cloneNode(true).firstElementChild;
  const sent = images, mode = $("#mode :checked").value;
  $(".question", turn).textContent = question;
  $(".images", turn).append(...sent.map((uri, i) => picture(uri, `Image ${i + 1} of the question`)));
  $("#welcome").hidden = true;
  $("#turns").append(turn);
  const content = [...sent.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: question }];
  const messages = [...history, { role: "user", content }];
  images = [];
  showImages();
  $("#question").value = "";
  scrollTo(0, document.body.scrollHeight);
  const body = { messages, mode, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "max_tokens", "thinking_budget"]) {
    if ($(`#${name}`).value !== "") body[name] = Number($(`#${name}`).value);
  }
  const uri = messages.flatMap((m) => (Array.isArray(m.content) ? m.content : [])).findLast((p) => p.image_url)?.image_url.url;
  setRunning(new AbortController());
  const answer = new Answer(turn, uri);
  try {
    for await (const piece of stream(body, running.signal)) answer.add(piece);
  } catch (error) {
    if (error.name !== "AbortError") answer.fail(error.message);
    else answer.stopped = true;
  }
  answer.end();
  setRunning(null);
  if (!turn.isConnected) return; // a new conversation has begun
  if (answer.text) history = [...messages, { role: "assistant", content: answer.text }];
  else { // nothing to build on: the question may be asked again
    $("#question").value ||= question;
    images = images.length ? images : sent;
    showImages();
  }
  $("#question").focus();
}

class Answer {
  constructor(turn, uri) {
    Object.assign(this, { turn, uri, text: "", thought: "", pieces: 0, stopped: false, begun: performance.now() });
    this.timer = setInterval(() => this.show(), 100);
    this.show();
  }

  add(piece) {
    const now = performance.now(), choice = piece.choices[0];
    if (piece.usage) this.usage = piece.usage;
    if (!choice) return;
    const { reasoning_content: thought, content } = choice.delta;
    if (thought || content) {
      this.first ??= now;
      this.last = now;
      this.pieces++;
    }
    if (thought) this.thoughtBegun ??= now;
    if (thought) this.thought += thought;
    if (content && this.thoughtBegun) this.thoughtEnded ??= now;
    if (content) this.text += content;
    if (choice.finish_reason) this.finish = choice;
    this.changed = true;
  }

  show() {
    const now = this.ended ?? performance.now(), details = $(".thought", this.turn), seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;
    if (this.changed) {
      const atEnd = innerHeight + scrollY >= document.body.scrollHeight - 80;
      $("div", details).textContent = this.thought;
      showMarks(this.turn, this.text, this.uri);
      if (atEnd) scrollTo(0, document.body.scrollHeight);
      this.changed = false;
    }
    details.hidden = !this.thoughtBegun;
    if (this.thoughtBegun) {
      const ended = this.thoughtEnded ?? this.ended;
      $("summary", details).textContent = `${ended ? "Thought for" : "Thinking …"} ${seconds((ended ?? now) - this.thoughtBegun)}`;
    }
    const numbers = [], tokens = this.usage?.completion_tokens ?? this.pieces, decode = this.finish?.phivision?.decode_s * 1000 || this.last - this.first;
    if (!this.first) numbers.push(this.ended ? "" : `Waiting … ${seconds(now - this.begun)}`);
    else {
      numbers.push(`${tokens} tokens`);
      if (tokens > 1 && decode > 0) numbers.push(`${((tokens - 1) / decode * 1000).toFixed(1)} tokens/s`);
      numbers.push(`first after ${seconds(this.first - this.begun)}`);
    }
    if (this.stopped) numbers.push("stopped");
    else if (this.finish?.finish_reason === "length") numbers.push("cut off by a limit");
    $(".numbers", this.turn).textContent = numbers.filter(Boolean).join(" · ");
  }

  fail(message) {
    $(".error", this.turn).textContent = message;
    $(".error", this.turn).hidden = false;
    requestAnimationFrame(() => scrollTo(0, document.body.scrollHeight));
  }

  end() {
    clearInterval(this.timer);
    this.ended = performance.now();
    this.changed = true;
    this.show();
  }
}

async function* stream(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) {
    const reply = await response.json().catch(() => null);
    throw new Error(reply?.error?.message ?? `The server answered with status ${response.status}.`);
  }
  let text = "";
  for await (const chunk of chunks(response.body.pipeThrough(new TextDecoderStream()))) {
    const events = (text + chunk).split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const piece = JSON.parse(data);
      if (piece.error) throw new Error(piece.error.message);
      yield piece;
    }
  }
  throw new Error("The connection ended before the answer did.");
}

async function* chunks(readable) { // not every browser can iterate over a stream
  const reader = readable.getReader();
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) yield value;
}

function setRunning(controller) {
  running = controller;
  $("#send").hidden = controller !== null;
  $("#stop").hidden = controller === null;
}

// ---- controls

$("#ask").onsubmit = (event) => {
  event.preventDefault();
  const question = $("#question").value.trim();
  if (!running && (question || images.length)) ask(question);
};
$("#question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("#ask").requestSubmit();
  }
};
$("#stop").onclick = () => running?.abort();
document.onkeydown = (event) => { if (event.key === "Escape") running?.abort(); };
$("#add").onclick = () => $("#files").click();
$("#files").onchange = () => { readImages($("#files").files); $("#files").value = ""; };
$("#clear").onclick = () => {
  running?.abort();
  history = [];
  images = [];
  showImages();
  document.querySelectorAll(".turn").forEach((turn) => turn.remove());
  $("#welcome").hidden = false;
  $("#question").focus();
};
for (const button of document.querySelectorAll("#examples button")) {
  button.onclick = () => { $("#question").value = button.textContent; $("#question").focus(); };
}
document.onpaste = (event) => readImages(event.clipboardData.files);
document.ondragover = (event) => { event.preventDefault(); document.body.classList.add("dropping"); };
document.ondragleave = (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); };
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  readImages(event.dataTransfer.files);
};

fetch("v1/models").then((reply) => reply.json()).then((list) => { $("#model").textContent = list.data[0].id; });
