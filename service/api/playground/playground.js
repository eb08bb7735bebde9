/* The playground: shows a picture with what the service finds in it.

   take(file) shows the picture and calls ask(), which posts it once with score_threshold 0.05; the score slider and the
   label boxes then filter what came, without another request. Everything on the page is drawn from `state` by the
   render functions. An API key lives in `state` alone. */

const ASKED_SCORE = 0.05, MOST_DETECTIONS = 5000, USUAL_SCORE = 0.5, USUAL_NMS = 0.5;
const COLOURS = ["#ffb454", "#59c2ff", "#4fd6a6", "#f2e25c", "#ff8f8f", "#d7a6ff", "#9be15d", "#f7f7f7"];
const LINES = ["solid", "dashed", "dotted"];
const STAGES = ["read", "decode", "preprocess", "queue", "inference", "postprocess"];
const FEW_LABELS = 12, MANY_BYTES = 1e6, MOST_TICKS = 300;

const $ = (id) => document.getElementById(id);
const url = (path) => new URL(path, document.baseURI).href;
const state = {
  model: null, key: "", keyWanted: false,
  picture: null,       // {file, name, example, shown: promise of [width, height] or null}
  visible: false,
  answer: null, roundTrip: 0,
  unchecked: new Set(), active: null, zoom: null,   // zoom: screen pixels for one of the picture, null fits it
  request: null, ticker: null, countdown: null,
};

// ---- asking the service

const keyHeaders = () => (state.key ? { Authorization: `Bearer ${state.key}` } : {});

async function askModel() {
  let reply;
  try {
    reply = await fetch(url("model"), { headers: { Accept: "application/json", ...keyHeaders() } });
  } catch {
    return say("The service does not answer. Is it running?");
  }
  if (reply.status === 401) {
    wantKey("This service asks for an API key before it tells what its model knows.");
    return state.key && showProblem(await reply.json());
  }
  if (!reply.ok) {
    $("knows").textContent = reply.status === 503 ? "The model is loading …" : `The service answers ${reply.status} about its model.`;
    setTimeout(askModel, 1000 * (Number(reply.headers.get("Retry-After")) || 2));
    return;
  }
  state.model = await reply.json();
  if (!$("score").dataset.touched) $("score").value = state.model.suggested_score_threshold ?? USUAL_SCORE;
  if (!$("nms").dataset.touched) $("nms").value = state.model.defaults.nms_threshold;
  renderModel();
  render();
}

function take(file, example = false) {
  if (!file) return;
  quit();
  const picture = { file, name: file.name || "picture.png", example };
  Object.assign(state, { picture, answer: null, visible: false, zoom: null });
  picture.shown = showFile(picture);
  hideProblem();
  render();
  ask();
}

async function takeExample() {
  quit();
  say("Fetching the example …");
  try {
    const reply = await fetch(url("playground/example.jpg"));
    take(new File([await reply.blob()], "example.jpg", { type: "image/jpeg" }), true);
  } catch {
    showProblem({ code: "connection_lost", title: "The example did not arrive", detail: "The service does not answer. Is it running?" });
  }
}

/* Posts the picture; what comes is the new answer, or a problem. */
function ask() {
  if (!state.picture) return;
  quit();
  hideProblem();
  const { file } = state.picture;
  const query = new URLSearchParams({
    score_threshold: ASKED_SCORE, nms_threshold: $("nms").value, max_detections: MOST_DETECTIONS, ...tiles(),
  });
  const started = performance.now();
  state.request = post(`detect?${query}`, "application/json", "text", (reply) => {
    done();
    const answer = reply.status === 200 ? parsed(reply.response) : null;
    if (!answer) return fail(reply);
    state.answer = answer;
    state.roundTrip = performance.now() - started;
    drawWhereTheBrowserCannot(state.picture);
    render();
    say(outcome());
  }, sending);
  say(`Sending ${state.picture.name}, ${bytes(file.size)} …`);
  busy(started);
}

const tiles = () => ($("tile").value ? { tile: $("tile").value } : {});

function sending({ loaded, total }) {
  say(loaded < total ? `Sending ${state.picture.name}: ${Math.floor((100 * loaded) / total)} % of ${bytes(total)}` : "Detecting …");
}

function post(path, accept, type, then, progress = null) {
  const request = new XMLHttpRequest(), { file } = state.picture;
  request.open("POST", url(path));
  request.responseType = type;
  request.setRequestHeader("Accept", accept);
  request.setRequestHeader("Content-Type", file.type.startsWith("image/") ? file.type : "application/octet-stream");
  for (const [name, value] of Object.entries(keyHeaders())) request.setRequestHeader(name, value);
  request.upload.onprogress = progress;
  request.onloadend = () => request.aborted || then(request);
  request.send(file);
  return request;
}

function quit() {
  if (state.request) {
    state.request.aborted = true;
    state.request.abort();
  }
  clearInterval(state.countdown);
  done();
}

function busy(started) {
  $("busy").classList.add("on");
  $("viewport").setAttribute("aria-busy", "true");
  state.ticker = setInterval(() => ($("elapsed").textContent = `${((performance.now() - started) / 1000).toFixed(1)} s`), 100);
}

function done() {
  clearInterval(state.ticker);
  state.request = null;
  $("busy").classList.remove("on");
  $("elapsed").textContent = "";
  $("viewport").removeAttribute("aria-busy");
}

// ---- problems

function fail(request) {
  let problem = { code: "connection_lost", title: "No answer came", detail: "The connection was lost on the way. Is the service running?" };
  if (request.status) {
    const title = `The service, or something before it, answered ${request.status}`;
    problem = { code: `http_${request.status}`, title, detail: request.statusText, ...parsed(request.response) };
  }
  if (request.status === 401) wantKey("");
  const seconds = Number(request.getResponseHeader("Retry-After"));
  showProblem(problem, request.status === 429 || request.status === 503 ? Math.max(1, Math.ceil(seconds || 1)) : 0);
}

function showProblem({ code, title, detail, request_id: id }, seconds = 0) {
  say("");
  const timer = element("p", { className: "timer", role: "timer" });
  $("problem").replaceChildren(
    element("p", {}, element("code", { textContent: code }), " ", element("strong", { textContent: title })),
    element("p", { textContent: detail }),
    ...(id ? [element("p", { className: "note", textContent: `request_id ${id}` })] : []),
    ...(seconds ? [timer] : []),
  );
  $("problem").hidden = false;
  $("problem-actions").hidden = !state.picture;
  $("stop").hidden = !seconds;
  $("problem").scrollIntoView({ block: "nearest" });
  if (!seconds) return;
  const until = performance.now() + 1000 * seconds;
  const tick = () => {
    const left = Math.ceil((until - performance.now()) / 1000);
    if (left <= 0) return ask();
    timer.textContent = `Repeats in ${left} s`;
  };
  tick();
  state.countdown = setInterval(tick, 250);
}

function hideProblem() {
  clearInterval(state.countdown);
  $("problem").hidden = $("problem-actions").hidden = true;
}

function wantKey(why) {
  state.keyWanted = true;
  $("key-form").hidden = false;
  $("key-toggle").setAttribute("aria-expanded", "true");
  if (why) $("knows").textContent = why;
  $("key").focus();
  render();
}

// ---- the picture

/* Shows a file if the browser can: [width, height], or null. A GIF moves away from its boxes, so it counts as what cannot. */
async function showFile(picture) {
  if (picture.file.type === "image/gif") return null;
  return show(picture, picture.file);
}

async function show(picture, blob) {
  const image = $("picture"), source = URL.createObjectURL(blob);
  URL.revokeObjectURL(image.src);
  image.src = source;
  const decoded = await image.decode().then(() => true, () => false);
  image.classList.toggle("broken", !image.naturalWidth);
  if (!decoded) return null;
  if (state.picture !== picture) return null;
  state.visible = true;
  render();
  return [image.naturalWidth, image.naturalHeight];
}

/* Lets the service draw, without a box, what the browser does not show, or shows in another size (turned). */
async function drawWhereTheBrowserCannot(picture) {
  const shown = await picture.shown, { width, height } = state.answer?.image ?? {};
  if (state.picture !== picture || !width || (shown && shown[0] === width && shown[1] === height)) return;
  picture.shown = Promise.resolve([width, height]);
  $("drop-title").textContent = picture.name;
  $("drop-hint").textContent = "This browser does not show it as it is: the service draws it …";
  post("detect?score_threshold=1", "image/png", "blob", (reply) => {
    if (state.picture !== picture) return;
    if (reply.status === 200) show(picture, reply.response);
    else $("drop-hint").textContent = "Neither this browser nor the service shows it now. The list has what was found.";
  });
}

function layOut() {
  const { width, height } = size(), viewport = $("viewport");
  if (!width || !state.visible) return;
  const fit = Math.min(viewport.clientWidth / width, (0.72 * innerHeight) / height, 4);
  const scale = state.zoom ?? fit;
  $("canvas").style.width = `${Math.round(width * scale)}px`;
  $("canvas").style.height = `${Math.round(height * scale)}px`;
  $("zoom-level").textContent = state.zoom ? `${Math.round(100 * scale)} %` : "Fit";
  state.scale = scale;
  state.fit = fit;
  placeTags();
}

function size() {
  const image = $("picture");
  return state.answer?.image ?? { width: image.naturalWidth, height: image.naturalHeight };
}

function zoom(factor, event) {
  if (!state.visible) return;
  const viewport = $("viewport"), frame = viewport.getBoundingClientRect(), canvas = $("canvas").getBoundingClientRect();
  const x = event ? event.clientX : frame.left + frame.width / 2, y = event ? event.clientY : frame.top + frame.height / 2;
  const at = [(x - canvas.left) / canvas.width, (y - canvas.top) / canvas.height];
  const wanted = factor && Math.min(16, Math.max(state.fit, state.scale * factor));
  state.zoom = factor && wanted > state.fit * 1.001 ? wanted : null;
  layOut();
  const moved = $("canvas").getBoundingClientRect();
  viewport.scrollBy(moved.left + at[0] * moved.width - x, moved.top + at[1] * moved.height - y);
}

// ---- what is shown of the answer

/* The detections that the present settings keep, as the service would with the same query. */
function shownDetections() {
  if (!state.answer) return [];
  const score = Number($("score").value), most = state.model?.defaults.max_detections ?? 300;
  return state.answer.detections.filter((found) => found.score > score && !state.unchecked.has(found.label)).slice(0, most);
}

function outcome({ filtered = false } = {}) {
  const shown = shownDetections().length, { detections, timing_ms: timing } = state.answer;
  if (shown && filtered) return `${shown} of ${count(detections.length, "object")}`;
  if (shown) return `${count(shown, "object")} in ${milliseconds(timing.total)}`;
  const score = Number($("score").value).toFixed(2), labels = state.unchecked.size ? " with these labels" : "";
  const where = detections.length ? `${labels} above a score of ${score}` : ` in ${milliseconds(timing.total)}`;
  const more = !detections.length ? "" : labels ? ` ${count(detections.length, "object")} came with other labels or lower scores.`
    : ` The best of ${detections.length} scores ${detections[0].score.toFixed(2)}: lower the threshold to see it.`;
  const hint = isShapes() ? " This model knows drawn shapes; `make coco` serves one for everyday objects." : "";
  return `Nothing found${where}.${more}${hint}`;
}

const isShapes = () => state.model && (state.model.name === "shapes" || /^shapes/.test(state.model.data_set ?? ""));

function render() {
  const shown = shownDetections();
  state.active = null;
  $("score-value").textContent = Number($("score").value).toFixed(2);
  $("nms-value").textContent = Number($("nms").value).toFixed(2);
  $("drop").hidden = state.visible;
  $("viewport").hidden = $("zoom").hidden = !state.visible;
  $("save-json").disabled = $("save-picture").disabled = !state.answer;
  renderBoxes(shown);
  renderRows(shown);
  renderTicks();
  renderLabels();
  renderTiming();
  renderCode(shown);
  layOut();
}

function renderModel() {
  const { model } = state, labels = [...new Set(model.labels.map((entry) => entry.label))];
  $("model-name").textContent = model.name;
  document.title = `${model.name} · retinaserve`;
  const few = labels.slice(0, FEW_LABELS), more = labels.length - few.length;
  const between = (n) => (n === 0 ? "Finds " : n === few.length - 1 && !more ? " and " : ", ");
  const named = few.flatMap((label, n) => [between(n), element("b", { textContent: label })]);
  $("knows").replaceChildren(...named, more ? ` and ${more} more.` : ".");
  $("fallback").hidden = !model.fell_back;
  $("fallback").textContent =
    "The CPU stands in for CUDA. A GPU was wanted and does not work: the service's log says why. Answers are right, and slow.";
  const device = model.provider.replace("ExecutionProvider", "");
  const ap = model.ap == null ? [] : [["AP", model.ap.toFixed(3), model.data_set && `on ${model.data_set}`]];
  const facts = [...ap, ["Runs on", device, model.precision], ["SHA-256", model.sha256.slice(0, 12), ""]];
  $("facts").replaceChildren(...facts.map(([name, value, rest]) => {
    const small = rest ? element("small", { textContent: ` ${rest}` }) : "";
    return element("div", {}, element("dt", { textContent: name }), element("dd", {}, value, small));
  }));
  $("facts").lastChild.title = model.sha256;
}

function look(found) {
  const index = state.model?.labels.findIndex((entry) => entry.class_id === found.class_id) ?? -1;
  const n = index < 0 ? found.class_id : index;
  return [COLOURS[n % COLOURS.length], LINES[n % LINES.length]];
}

function paint(node, found) {
  const [colour, line] = look(found);
  node.style.setProperty("--colour", colour);
  node.dataset.line = line;
  return node;
}

function renderBoxes(shown) {
  const { width, height } = size();
  $("boxes").classList.remove("some");
  $("boxes").replaceChildren(...shown.map((found) => {
    const { xmin, ymin, xmax, ymax } = found.box;
    const tag = element("span", { className: "tag" }, found.label, " ", element("small", { textContent: found.score.toFixed(2) }));
    const box = paint(element("div", { className: "box" }, tag), found);
    Object.assign(box.style, {
      left: `${(100 * xmin) / width}%`, top: `${(100 * ymin) / height}%`,
      width: `${(100 * (xmax - xmin)) / width}%`, height: `${(100 * (ymax - ymin)) / height}%`,
    });
    return box;
  }));
  const counts = [...countBy(shown)].map(([label, n]) => `${n} ${label}`).join(", ");
  const boxes = state.answer ? ` with ${count(shown.length, "box", "boxes")}` : "";
  $("canvas").setAttribute("aria-label", `The picture${boxes}${counts && `: ${counts}`}`);
}

/* Gives each box's tag the spot where it hides least, the best score first; a tag that would hide another's shows only
   while its box is active. */
function placeTags() {
  const { clientWidth: right, clientHeight: bottom } = $("canvas"), boxes = [...$("boxes").children], tags = [];
  const frames = boxes.map((box) => [box.offsetLeft, box.offsetTop, box.offsetWidth, box.offsetHeight]);
  boxes.forEach((box, n) => {
    const tag = box.lastChild, w = tag.offsetWidth, h = tag.offsetHeight, [x, y, bw, bh] = frames[n];
    const left = Math.max(0, Math.min(x, right - w)), end = Math.max(0, x + bw - w);
    const spots = [[left, y - h], [left, y + bh], [end, y - h], [end, y + bh], [x + bw, y], [x - w, y], [x + 3, y + 3]]
      .filter(([sx, sy]) => sx >= 0 && sy >= 0 && sx + w <= right && sy + h <= bottom).map(([sx, sy]) => [sx, sy, w, h]);
    if (!spots.length) spots.push([left, Math.max(0, Math.min(y, bottom - h)), w, h]);
    const hidden = (spot) => 100 * sum(tags.map((other) => overlap(spot, other)))
      + sum(frames.map((other, i) => (i === n ? 0 : overlap(spot, other) / (other[2] * other[3]))));
    const [best] = spots.map((spot, i) => [hidden(spot) + i / 1000, spot]).sort((a, b) => a[0] - b[0]);
    tag.style.transform = `translate(${best[1][0] - x}px, ${best[1][1] - y}px)`;
    tag.classList.toggle("crowded", best[0] >= 100);
    if (best[0] < 100) tags.push(best[1]);
  });
}

/* The area in which two rectangles of x, y, width, height overlap. */
function overlap(a, b) {
  const w = Math.min(a[0] + a[2], b[0] + b[2]) - Math.max(a[0], b[0]), h = Math.min(a[1] + a[3], b[1] + b[3]) - Math.max(a[1], b[1]);
  return w > 0 && h > 0 ? w * h : 0;
}

function renderRows(shown) {
  $("rows").replaceChildren(...shown.map((found, n) => {
    const { xmin, ymin, xmax, ymax } = found.box, whole = (value) => Math.round(value);
    const row = element("tr", { tabIndex: n ? -1 : 0 },
      element("td", { title: found.label }, paint(element("span", { className: "swatch" }), found), found.label),
      element("td", { className: "number", textContent: found.score.toFixed(3) }),
      element("td", { className: "number", textContent: `${whole(xmin)}, ${whole(ymin)}` }),
      element("td", { className: "number", textContent: `${whole(xmax - xmin)} × ${whole(ymax - ymin)}` }));
    row.onfocus = () => activate(n, { show: true });
    row.onmouseenter = () => activate(n);
    return row;
  }));
  const none = state.answer ? "None with these settings." : state.picture ? "None yet." : "They come with the first picture.";
  $("table-note").textContent = shown.length ? "In pixels. Arrow keys move along the rows." : none;
}

function activate(n, { show = false, scroll = false } = {}) {
  if (n === state.active && !show) return;
  state.active = n;
  $("boxes").classList.toggle("some", n !== null);
  for (const list of [$("boxes").children, $("rows").children]) {
    [...list].forEach((node, i) => node.classList.toggle("active", i === n));
  }
  if (n === null) return;
  if (show && state.zoom) centre($("boxes").children[n]);
  if (scroll) $("rows").children[n].scrollIntoView({ block: "nearest" });
}

function centre(box) {
  const viewport = $("viewport");
  const left = box.offsetLeft + (box.offsetWidth - viewport.clientWidth) / 2;
  viewport.scrollTo(left, box.offsetTop + (box.offsetHeight - viewport.clientHeight) / 2);
}

/* The smallest box below the pointer: of boxes in one another the inner one can be reached too. */
function boxAt(event) {
  const canvas = $("canvas").getBoundingClientRect(), { width, height } = size();
  const x = ((event.clientX - canvas.left) / canvas.width) * width, y = ((event.clientY - canvas.top) / canvas.height) * height;
  let best = null, area = Infinity;
  shownDetections().forEach(({ box: { xmin, ymin, xmax, ymax } }, n) => {
    const own = (xmax - xmin) * (ymax - ymin);
    if (x >= xmin && x <= xmax && y >= ymin && y <= ymax && own < area) [best, area] = [n, own];
  });
  return best;
}

// ---- labels, times, code

/* A mark above the score slider for each detection that came. */
function renderTicks() {
  const score = Number($("score").value);
  const found = (state.answer?.detections ?? []).filter((each) => !state.unchecked.has(each.label)).slice(0, MOST_TICKS);
  $("ticks").replaceChildren(...found.map((each) => {
    const tick = element("span", { className: each.score > score ? "kept" : "" });
    tick.style.setProperty("--score", each.score);
    return tick;
  }));
}

function renderLabels() {
  const known = (state.model?.labels ?? state.answer?.detections ?? []).map((entry) => entry.label);
  const score = Number($("score").value), counts = countBy((state.answer?.detections ?? []).filter((found) => found.score > score));
  const came = new Set((state.answer?.detections ?? []).map((found) => found.label));
  const labels = [...new Set(known)], many = labels.length > FEW_LABELS;
  const present = many && state.answer ? labels.filter((label) => came.has(label)) : many ? [] : labels;
  const absent = labels.filter((label) => !present.includes(label));
  const focused = document.activeElement?.dataset?.label;
  $("labels").hidden = !labels.length;
  $("label-list").replaceChildren(...present.map((label) => labelItem(label, labels.indexOf(label), counts)));
  $("absent").hidden = !absent.length;
  $("absent-summary").textContent = state.answer ? `${absent.length} labels that are not in this picture` : `${absent.length} labels`;
  $("absent-list").replaceChildren(...absent.map((label) => labelItem(label, labels.indexOf(label), counts)));
  if (focused) document.querySelector(`[data-label="${CSS.escape(focused)}"]`)?.focus();
}

function labelItem(label, index, counts) {
  const id = `label-${index}`, entry = state.model?.labels.find((each) => each.label === label);
  const box = element("input", { type: "checkbox", id, checked: !state.unchecked.has(label) });
  box.dataset.label = label;
  box.onchange = () => {
    state.unchecked[box.checked ? "delete" : "add"](label);
    filter();
  };
  const n = counts.get(label) ?? 0;
  const swatch = paint(element("span", { className: "swatch" }), entry ?? { class_id: 0 });
  return element("li", { className: n ? "" : "zero" }, box, element("label", { htmlFor: id }, swatch, label),
    element("span", { className: "count", textContent: state.answer ? n : "" }));
}

function renderTiming() {
  $("timing").hidden = !state.answer;
  if (!state.answer) return;
  const timing = state.answer.timing_ms, stages = STAGES.filter((stage) => stage in timing);
  $("timing-total").textContent =
    `${milliseconds(timing.total)} in the service, ${milliseconds(state.roundTrip)} with the way there and back`;
  $("timing-bar").replaceChildren(...stages.map((stage, n) => {
    const part = element("span", { className: `part s${n}` });
    part.style.flexGrow = timing[stage];
    return part;
  }));
  $("timing-list").replaceChildren(...stages.map((stage, n) => {
    const dot = element("span", { className: `dot s${n}` });
    return element("li", {}, dot, stage, " ", element("b", { textContent: milliseconds(timing[stage]) }));
  }));
}

/* The answer of the call with the present settings, a detection on each line. */
function json(shown) {
  if (!state.answer) return "";
  const { detections: _, ...rest } = state.answer, lines = shown.map((found) => `  ${oneLine(found)}`).join(",\n");
  const others = Object.entries(rest).map(([name, value]) => ` ${JSON.stringify(name)}: ${oneLine(value)}`).join(",\n");
  return `{"detections": [${lines && `\n${lines}\n `}],\n${others}}\n`;
}

function renderCode(shown) {
  const labels = [...new Set((state.model?.labels ?? []).map((entry) => entry.label))];
  const kept = state.unchecked.size ? labels.filter((label) => !state.unchecked.has(label)) : [];
  const call = {
    name: state.picture?.name ?? "photo.jpg", example: state.picture?.example, key: Boolean(state.key || state.keyWanted),
    query: [
      ["score_threshold", $("score").value], ["nms_threshold", $("nms").value], ...Object.entries(tiles()), ...kept.map((label) => ["label", label]),
    ],
  };
  $("code-curl").textContent = curl(call);
  $("code-python").textContent = python(call);
  $("code-javascript").textContent = javascript(call);
  $("code-json").textContent = json(shown) || "The answer comes with the first picture.";
}

const shell = (text) => (/^[\w./:@%+=,-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

function curl({ name, example, key, query }) {
  const path = /[",;\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name;
  return [
    ...(example ? [`curl -s -o ${name} ${shell(url("playground/example.jpg"))}`] : []),
    `curl -s -F ${shell(`image=@${path}`)}${key ? ' -H "Authorization: Bearer $RETINASERVE_API_KEY"' : ""} \\`,
    `  ${shell(`${url("detect")}?${new URLSearchParams(query)}`)}`, ""].join("\n");
}

function python({ name, example, key, query }) {
  const value = ([option, each]) => `("${option}", ${option === "label" ? JSON.stringify(each) : each})`;
  const ours = `httpx.get(${JSON.stringify(url("playground/example.jpg"))}).content`;
  return [
    ...(key ? ["import os", ""] : []), "import httpx", "",
    `image = ${example ? ours : `open(${JSON.stringify(name)}, "rb").read()`}`,
    "response = httpx.post(",
    `    ${JSON.stringify(url("detect"))},`,
    `    params=[${query.map(value).join(", ")}],`,
    ...(key ? ['    headers={"Authorization": f"Bearer {os.environ[\'RETINASERVE_API_KEY\']}"},'] : []),
    '    files={"image": image},', "    timeout=60,", ")", "response.raise_for_status()",
    'for found in response.json()["detections"]:', '    print(found["label"], found["score"], found["box"])', ""].join("\n");
}

function javascript({ name, example, key, query }) {
  const ours = `await (await fetch(${JSON.stringify(url("playground/example.jpg"))})).blob()`;
  const picture = example ? ours : `await openAsBlob(${JSON.stringify(name)})`;
  return [
    ...(example ? [] : ['import { openAsBlob } from "node:fs"; // Node 20 or later, as a module; in a page take the File of an input', ""]),
    "const body = new FormData();", `body.append("image", ${picture}, ${JSON.stringify(name)});`,
    `const response = await fetch(${JSON.stringify(`${url("detect")}?${new URLSearchParams(query)}`)}, {`, '  method: "POST",',
    ...(key ? ["  headers: { Authorization: `Bearer ${process.env.RETINASERVE_API_KEY}` },"] : []),
    "  body,", "});", "if (!response.ok) throw new Error(await response.text());",
    "for (const found of (await response.json()).detections) console.log(found.label, found.score, found.box);", ""].join("\n");
}

async function copy() {
  const text = openPanel().textContent, button = $("copy");
  try {
    await navigator.clipboard.writeText(text);
  } catch { // without HTTPS there is no clipboard: the old way
    getSelection().selectAllChildren(openPanel());
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function save(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

const stem = () => state.picture.name.replace(/\.\w+$/, "");

/* The picture in its own pixels with the boxes that are shown. */
function savePicture() {
  const { width, height } = size(), canvas = element("canvas", { width, height }), pen = canvas.getContext("2d");
  const unit = Math.max(1, Math.round(Math.max(width, height) / 500));
  pen.drawImage($("picture"), 0, 0, width, height);
  pen.font = `600 ${7 * unit + 6}px system-ui, sans-serif`;
  pen.textBaseline = "top";
  for (const found of shownDetections().reverse()) {
    const { xmin, ymin, xmax, ymax } = found.box, text = `${found.label} ${found.score.toFixed(2)}`, tall = 7 * unit + 12;
    const wide = pen.measureText(text).width + 8, x = Math.max(0, Math.min(xmin, width - wide)), y = ymin >= tall ? ymin - tall : ymin;
    const [colour, line] = look(found), dashes = { solid: [], dashed: [6 * unit, 3 * unit], dotted: [2 * unit, 2 * unit] }[line];
    for (const [strokeStyle, lineWidth, dash] of [["#000b", 2 * unit + 2, []], [colour, 2 * unit, dashes]]) {
      Object.assign(pen, { strokeStyle, lineWidth });
      pen.setLineDash(dash);
      pen.strokeRect(xmin, ymin, xmax - xmin, ymax - ymin);
    }
    pen.fillStyle = colour;
    pen.fillRect(x, y, wide, tall);
    pen.fillStyle = "#14161a";
    pen.fillText(text, x + 4, y + 3);
  }
  const [type, ending] = state.picture.file.type === "image/jpeg" ? ["image/jpeg", "jpg"] : ["image/png", "png"];
  const drawn = (blob) => (blob ? save(blob, `${stem()}-detections.${ending}`) : say("The picture is too large for this browser to draw."));
  canvas.toBlob(drawn, type, 0.92);
}

// ---- small things

/* Says an outcome; what stands in backticks is a command. */
const say = (text) =>
  $("status").replaceChildren(...text.split("`").map((part, n) => (n % 2 ? element("code", { textContent: part }) : part)));
const parsed = (text) => {
  try {
    return JSON.parse(text);
  } catch { // the page of a proxy
    return null;
  }
};
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const count = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;
const bytes = (n) => (n >= MANY_BYTES ? `${(n / 1e6).toFixed(1)} MB` : `${Math.max(1, Math.round(n / 1000))} kB`);
const milliseconds = (ms) => (ms < 1000 ? `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);
const oneLine = (value) => JSON.stringify(value, null, 1).replace(/\n */g, " ");
const openPanel = () => document.querySelector("[role=tabpanel]:not([hidden])");

function countBy(detections) {
  const counts = new Map();
  for (const { label } of detections) counts.set(label, (counts.get(label) ?? 0) + 1);
  return counts;
}

function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  if (properties.role) node.setAttribute("role", properties.role);
  node.append(...children);
  return node;
}

function filter() {
  render();
  if (state.answer && !state.request) say(outcome({ filtered: true }));
}

function openTab(tab) {
  for (const each of document.querySelectorAll("[role=tab]")) {
    each.setAttribute("aria-selected", String(each === tab));
    each.tabIndex = each === tab ? 0 : -1;
    $(each.getAttribute("aria-controls")).hidden = each !== tab;
  }
}

/* Arrow keys, Home and End among siblings; the one to go to, or undefined. */
function sibling(event, nodes, back, forth) {
  const at = nodes.indexOf(event.target.closest("[role=tab], tr"));
  const to = { [back]: Math.max(0, at - 1), [forth]: Math.min(nodes.length - 1, at + 1), Home: 0, End: nodes.length - 1 }[event.key];
  if (to !== undefined) event.preventDefault();
  return nodes[to];
}

// ---- what people do

for (const input of [$("image"), $("camera")]) {
  input.onchange = () => {
    take(input.files[0]);
    input.value = ""; // so that the same file can be chosen again
  };
}
$("drop").onclick = () => $("image").click();
$("example").onclick = takeExample;
$("again").onclick = ask;
$("stop").onclick = () => {
  clearInterval(state.countdown);
  $("stop").hidden = true;
  document.querySelector(".timer")?.remove();
};
$("score").oninput = (event) => {
  event.target.dataset.touched = "yes";
  filter();
};
$("nms").oninput = (event) => {
  event.target.dataset.touched = "yes";
  $("nms-value").textContent = Number(event.target.value).toFixed(2);
};
for (const id of ["nms", "tile"]) {
  $(id).onchange = () => {
    renderCode(shownDetections());
    ask();
  };
}
$("all").onclick = () => {
  state.unchecked.clear();
  filter();
};
$("none").onclick = () => {
  document.querySelectorAll("[data-label]").forEach((box) => state.unchecked.add(box.dataset.label));
  filter();
};
$("key-toggle").onclick = () => {
  const open = ($("key-form").hidden = !$("key-form").hidden);
  $("key-toggle").setAttribute("aria-expanded", String(!open));
  if (!open) $("key").focus();
};
$("key-form").onsubmit = (event) => {
  event.preventDefault();
  state.key = $("key").value.trim();
  $("key").value = "";
  $("key-form").hidden = true;
  $("key-toggle").setAttribute("aria-expanded", "false");
  hideProblem();
  askModel();
  if (!state.answer) ask();
  renderCode(shownDetections());
};

const files = (transfer) => [...(transfer?.files ?? [])];
document.addEventListener("paste", (event) => take(files(event.clipboardData)[0]));
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dragging", kind === "dragover" || kind === "dragenter");
    if (kind === "drop" && files(event.dataTransfer).length) take(files(event.dataTransfer)[0]);
    else if (kind === "drop") say("That was no file. Save the picture and drop the file, or copy the picture and paste it.");
  });
}

const viewport = $("viewport");
$("zoom-in").onclick = () => zoom(1.5);
$("zoom-out").onclick = () => zoom(1 / 1.5);
$("zoom-fit").onclick = () => zoom(0);
viewport.ondblclick = (event) => zoom(state.zoom ? 0 : 2.5, event);
viewport.onkeydown = (event) => {
  const factor = { "+": 1.5, "=": 1.5, "-": 1 / 1.5, 0: 0 }[event.key];
  if (factor !== undefined && !event.ctrlKey && !event.metaKey) zoom(factor);
};
viewport.addEventListener("wheel", (event) => {
  if (!event.ctrlKey) return;
  event.preventDefault();
  zoom(Math.exp(-event.deltaY / 200), event);
}, { passive: false });
$("canvas").onpointermove = (event) => {
  if (event.buttons && event.pointerType === "mouse") viewport.scrollBy(-event.movementX, -event.movementY);
  else if (state.answer) activate(boxAt(event), { scroll: true });
};
const activateFocused = () => {
  const focused = [...$("rows").children].indexOf(document.activeElement);
  activate(focused < 0 ? null : focused);
};
$("canvas").onpointerleave = activateFocused;
$("canvas").onclick = (event) => state.answer && $("rows").children[boxAt(event) ?? -1]?.focus({ preventScroll: true });
$("canvas").ondragstart = (event) => event.preventDefault();
$("rows").onmouseleave = activateFocused;
$("rows").addEventListener("focusout", () => activate(null));
$("rows").onkeydown = (event) => {
  const rows = [...$("rows").children], row = sibling(event, rows, "ArrowUp", "ArrowDown");
  if (!row) return;
  rows.forEach((each) => (each.tabIndex = each === row ? 0 : -1));
  row.focus();
};
document.querySelector("[role=tablist]").onkeydown = (event) => {
  const tab = sibling(event, [...document.querySelectorAll("[role=tab]")], "ArrowLeft", "ArrowRight");
  if (!tab) return;
  openTab(tab);
  tab.focus();
};
document.querySelectorAll("[role=tab]").forEach((tab) => (tab.onclick = () => openTab(tab)));
$("copy").onclick = copy;
$("save-json").onclick = () => save(new Blob([json(shownDetections())], { type: "application/json" }), `${stem()}.json`);
$("save-picture").onclick = savePicture;
new ResizeObserver(layOut).observe(viewport);

render();
askModel();
