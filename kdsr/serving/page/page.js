// The page to try the server: everything it shows comes from this server, everything it knows from /v1/models.

const $ = (id) => document.getElementById(id);
const MEGA = 2 ** 20;
const MOST_TRIES = 5;
const FORMATS = "JPEG, PNG, WebP, AVIF, HEIC, TIFF, GIF, BMP or PPM";

const page = {
  offer: null, // what /v1/models said
  file: null,
  source: null, // object URL of the file
  isShown: false, // whether the browser can show the file
  request: null, // the XMLHttpRequest under way
  order: null, // what is asked for, so that it can be asked for again
  timer: 0,
  result: null, // object URL of the result
  spot: { x: 0.68, y: 0.4, zoom: 2 },
};

// ---------------------------------------------------------------- words for people

const size = (bytes) =>
  bytes >= MEGA / 2 ? `${+(bytes / MEGA).toFixed(1)} MB` : `${Math.max(1, Math.round(bytes / 1024))} KB`;
const millions = (pixels) => `${(pixels / 1e6).toFixed(pixels < 1e7 ? 1 : 0)} million`;
const seconds = (ms) => (ms < 995 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

const SENTENCES = {
  "bad-request": "The server could not read this request.",
  "unauthorized": "This API key is not known here.",
  "forbidden": "The server does not allow this.",
  "not-acceptable": "The server cannot write this format.",
  "slow-body": "Sending took too long. A smaller file or a better connection helps.",
  "conflict": "The server is still working on this picture.",
  "body-too-large": "This file is too large.",
  "image-too-large": "This picture has too many pixels for one request. A smaller picture or scale works.",
  "unsupported-media-type": `This is not a picture that can be read. ${FORMATS} work.`,
  "invalid-option": "This choice does not work for this picture.",
  "invalid-image": "This picture is damaged or not complete.",
  "busy": "The server is busy.",
  "quota": "This key has had all its pixels for the moment.",
  "loading": "The models are still being loaded.",
  "worker-lost": "The server lost this picture on its way.",
  "store-unavailable": "The server cannot reach its storage.",
  "deadline": "This took too long. A smaller picture or scale works.",
  "internal": "Something went wrong in the server.",
};
const BY_STATUS = { 401: "unauthorized", 413: "body-too-large", 415: "unsupported-media-type", 422: "invalid-option", 429: "busy", 503: "loading", 504: "deadline" };

function sentence(problem, status) {
  const kind = (problem.type || "").replace("urn:kdsr:problem:", "") || BY_STATUS[status];
  return SENTENCES[kind] || `The server answered with ${status}.`;
}

const say = (text) => ($("status").textContent = text);

// ---------------------------------------------------------------- what is offered

const key = () => sessionStorage.getItem("kdsr-key");
const authorization = () => (key() ? { Authorization: `Bearer ${key()}` } : {});

async function askForOffer() {
  if (/[^\x21-\x7e]/.test(key() ?? "")) return askForKey(true); // No header could hold it.
  let reply;
  try {
    reply = await fetch("v1/models", { headers: authorization(), cache: "no-store" });
  } catch {
    return complain(unreachable(), { again: askForOffer });
  }
  const content = await reply.json().catch(() => ({}));
  if (reply.status === 401) return askForKey(Boolean(key()));
  if (!reply.ok) {
    const wait = Number(reply.headers.get("Retry-After")) || null;
    return complain(sentence(content, reply.status), { problem: content, again: askForOffer, wait });
  }
  settle();
  $("access").hidden = true;
  showOffer(content);
}

function askForKey(wasWrong) {
  $("access").hidden = false;
  if (wasWrong) complain(SENTENCES.unauthorized, {});
  $("key").focus();
}

function showOffer(offer) {
  page.offer = offer;
  const models = offer.models.map(({ name }) => new Option(name, name));
  $("model").replaceChildren(...models);
  $("takes").textContent = `${FORMATS.replace(" or", ",")}; up to ${size(offer.limits.max_body_bytes)}`;
  $("ask").hidden = false;
  showScales();
  refresh();
}

function showScales() {
  const model = page.offer.models.find(({ name }) => name === $("model").value);
  const before = chosen("scale");
  const largest = Math.max(...model.scales);
  const scale = model.scales.includes(before) ? before : largest;
  $("scales").replaceChildren(...model.scales.map((each) => segment("scale", each, `${each}×`, each === scale)));
}

/** One choice of several that stand side by side. */
function segment(name, value, text, isChecked) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name, value, checked: isChecked });
  const span = Object.assign(document.createElement("span"), { textContent: text });
  label.append(input, span);
  return label;
}

const chosen = (name) => Number(document.querySelector(`input[name="${name}"]:checked`)?.value);

// ---------------------------------------------------------------- a picture comes

async function take(file) {
  if (!file) return;
  abandon();
  settle();
  forgetResult();
  URL.revokeObjectURL(page.source);
  Object.assign(page, { file, source: URL.createObjectURL(file), isShown: false });
  const image = $("preview-image");
  image.src = page.source;
  image.alt = `The original: ${file.name}`;
  page.isShown = await image.decode().then(() => true, () => false);
  if (page.file !== file) return;
  image.hidden = !page.isShown;
  $("preview-note").hidden = page.isShown;
  $("preview-note").textContent =
    `Your browser cannot show ${file.name || "this file"} by itself. Upscaling may work all the same.`;
  makeRoom(image.naturalWidth * (chosen("scale") || 1) || 1, image.naturalHeight * (chosen("scale") || 1) || 1);
  show("preview");
  refresh();
  const pixels = page.isShown ? `, ${image.naturalWidth} by ${image.naturalHeight} pixels` : "";
  say(`${file.name}${pixels}, ${size(file.size)}`);
  const wrong = tooLarge();
  if (wrong) complain(wrong, {});
  (wrong ? $("other") : $("start")).focus();
}

/** Why the picture would be refused, as far as can be told before it is sent. */
function tooLarge() {
  const limits = page.offer?.limits;
  if (!limits || !page.file) return null;
  if (page.file.size > limits.max_body_bytes)
    return `This file is too large: it has ${size(page.file.size)}, and up to ${size(limits.max_body_bytes)} are taken.`;
  const pixels = page.isShown ? $("preview-image").naturalWidth * $("preview-image").naturalHeight : 0;
  if (pixels > limits.max_pixels)
    return `This picture has too many pixels: ${millions(pixels)}, and up to ${millions(limits.max_pixels)} are taken.`;
  if (pixels * chosen("scale") ** 2 > limits.max_output_pixels)
    return `The result would have too many pixels, ${millions(pixels * chosen("scale") ** 2)}. A smaller scale works.`;
  return null;
}

function show(name) {
  for (const each of ["empty", "preview", "compare", "unshown"]) $(each).hidden = each !== name;
}

function refresh() {
  $("other").hidden = !page.file;
  $("start").disabled = !page.file || !page.offer || Boolean(page.request) || Boolean(tooLarge());
}

// ---------------------------------------------------------------- asking

function start() {
  const options = { model: $("model").value, scale: chosen("scale"), format: wantedFormat() };
  for (const name of Object.keys(options)) if (!options[name]) delete options[name];
  // The same key for each try: what was done already is not done again.
  page.order = { file: page.file, options, key: newKey(), tries: 0 };
  send();
}

/** What the browser cannot read is asked for as PNG, so that at least the result is seen. */
function wantedFormat() {
  return $("format").value || (page.isShown ? "" : "png");
}

function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function send() {
  settle();
  const { file, options, key: idempotencyKey } = page.order;
  const request = (page.request = new XMLHttpRequest());
  const began = performance.now();
  page.order.tries += 1;
  request.open("POST", `v1/upscale?${new URLSearchParams(options)}`);
  request.responseType = "blob";
  request.setRequestHeader("Content-Type", "application/octet-stream");
  request.setRequestHeader("Idempotency-Key", idempotencyKey);
  for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
  request.upload.onprogress = (event) => phase("Sending", event.loaded, event.total);
  request.upload.onload = () => phase("Upscaling");
  request.onprogress = (event) => request.status < 300 && phase("Receiving", event.loaded, event.total);
  request.onerror = () => ended(() => complain(unreachable(), { again: send }));
  request.onload = () => ended(() => answered(request, performance.now() - began));
  phase("Sending", 0, file.size);
  $("working").hidden = false;
  refresh();
  $("cancel").focus();
  request.send(file);
}

function ended(next) {
  page.request = null;
  $("working").hidden = true;
  refresh();
  next();
}

let spoken = "";
function phase(name, done, total) {
  const bar = $("progress");
  if (total) bar.value = done / total;
  else bar.removeAttribute("value");
  $("phase").textContent = total ? `${name} … ${Math.round((done / total) * 100)} %` : `${name} …`;
  if (spoken !== name) say(`${name} …`);
  spoken = name;
}

function abandon() {
  page.request?.abort();
  page.request = null;
  $("working").hidden = true;
}

function cancel() {
  abandon();
  settle();
  refresh();
  say("Cancelled");
  $("start").focus();
}

async function answered(request, ms) {
  if (request.status === 200) return showResult(request, ms);
  const problem = await request.response.text().then(JSON.parse).catch(() => ({}));
  if (request.status === 401) return askForKey(Boolean(key()));
  const wait = Number(request.getResponseHeader("Retry-After")) || null;
  const canAgain = [429, 503, 504].includes(request.status) || (request.status === 409 && wait);
  complain(sentence(problem, request.status), { problem, again: canAgain ? send : null, wait });
}

// ---------------------------------------------------------------- trouble

const unreachable = () =>
  navigator.onLine ? "The server cannot be reached." : "You are offline. The picture is still here.";

/** Say what is wrong; with `again` offer another try, with `wait` make it by itself after so many seconds. */
function complain(text, { problem = {}, again = null, wait = null }) {
  settle();
  $("trouble").hidden = false;
  $("trouble-text").textContent = text;
  $("again").hidden = !again;
  $("again").onclick = () => (settle(), again());
  $("trouble-details").hidden = !problem.detail;
  $("trouble-details").lastElementChild.textContent = `${problem.detail} (${problem.instance})`;
  // The focus that was on what has gone is not to fall off the page.
  const isLost = [document.body, $("cancel")].includes(document.activeElement);
  if (again) $("again").focus();
  else if (page.file && isLost) $("other").focus();
  if (again && wait && (page.order?.tries ?? 0) < MOST_TRIES) countDown(wait, again);
}

function countDown(wait, again) {
  const end = performance.now() + wait * 1000;
  $("stop").hidden = $("trouble-wait").hidden = false;
  say(`Trying again in ${wait} seconds`);
  const tick = () => {
    const left = Math.ceil((end - performance.now()) / 1000);
    $("countdown").textContent = `Trying again in ${Math.max(left, 0)} s`;
    if (left <= 0) settle(), again();
  };
  page.timer = setInterval(tick, 250);
  tick();
}

/** No more trouble, and no try that would come by itself. */
function settle() {
  clearInterval(page.timer);
  for (const id of ["trouble", "stop", "trouble-wait"]) $(id).hidden = true;
}

// ---------------------------------------------------------------- the result

async function showResult(request, ms) {
  const blob = request.response;
  URL.revokeObjectURL(page.result);
  page.result = URL.createObjectURL(blob);
  const after = $("after");
  after.src = page.result;
  const isShown = await after.decode().then(() => true, () => false);
  if (page.result !== after.src) return;
  offerDownload(request, blob);
  showFacts(request, blob, ms);
  $("result").hidden = false;
  $("loupe").hidden = !isShown || !page.isShown;
  if (isShown) showCompare(after);
  else showUnshown(blob);
  refresh();
  say(`Done: ${request.getResponseHeader("Kdsr-Output-Size").replace("x", " by ")} pixels`);
}

/** Room for a picture of this many pixels. */
function makeRoom(width, height) {
  $("stage").style.setProperty("--ratio", width / height);
  $("stage").style.setProperty("--pixels", width);
}

function showCompare(after) {
  const compare = $("compare");
  makeRoom(after.naturalWidth, after.naturalHeight);
  compare.classList.toggle("alone", !page.isShown);
  $("marker").hidden = !page.isShown;
  $("before").src = page.source;
  show("compare");
  divide(50);
  if (!page.isShown) {
    $("unshown").hidden = false;
    $("unshown").textContent =
      `Your browser cannot show ${page.file.name} to compare, so this is the result alone, as PNG.`;
    return;
  }
  $("before").decode().then(drawLoupe, () => {});
  $("slider").focus({ preventScroll: true });
}

function showUnshown(blob) {
  show("unshown");
  $("unshown").textContent = `The result is ready. Your browser cannot show ${blob.type.replace("image/", "").toUpperCase()} files; download it to see it.`;
  $("download").focus();
}

function offerDownload(request, blob) {
  const suffix = { "image/jpeg": "jpg", "image/tiff": "tif", "image/x-portable-pixmap": "ppm" };
  const stem = (page.file.name || "picture").replace(/\.[^.]*$/, "");
  const ending = suffix[blob.type] || blob.type.replace("image/", "");
  $("download").href = page.result;
  $("download").download = `${stem}_x${request.getResponseHeader("Kdsr-Scale")}.${ending}`;
}

function showFacts(request, blob, ms) {
  const header = (name) => request.getResponseHeader(`Kdsr-${name}`) || "";
  const pixels = (text) => text.replace("x", " × ");
  const kind = (type) => (type ? `, ${type.replace("image/", "").toUpperCase()}` : "");
  const [work, queue] = [seconds(Number(header("Compute-Ms"))), seconds(Number(header("Queue-Ms")))];
  $("facts").replaceChildren(
    fact("Original", pixels(header("Input-Size")), `${size(page.file.size)}${kind(page.file.type)}`),
    fact("Upscaled", pixels(header("Output-Size")), `${size(blob.size)}${kind(blob.type)}`),
    fact("Network", header("Network"), `${header("Scale")} times as wide and high`),
    fact("Time", seconds(ms), `${work} at work, ${queue} waiting its turn`),
  );
}

function fact(name, ...lines) {
  const div = document.createElement("div");
  const add = (tag, textContent) => div.append(Object.assign(document.createElement(tag), { textContent }));
  add("dt", name);
  lines.forEach((line) => add("dd", line));
  return div;
}

function forgetResult() {
  URL.revokeObjectURL(page.result);
  page.result = null;
  $("result").hidden = $("loupe").hidden = true;
}

// ---------------------------------------------------------------- slider and loupe

function divide(percent) {
  $("slider").value = percent;
  $("compare").style.setProperty("--at", `${percent}%`);
  $("slider").setAttribute("aria-valuetext", `${Math.round(percent)} percent original`);
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), Math.max(low, high));

function lookAt(x, y) {
  page.spot.x = clamp(x, 0, 1);
  page.spot.y = clamp(y, 0, 1);
  drawLoupe();
}

/** The same part of both pictures; `zoom` CSS pixels are one pixel of the result. */
function drawLoupe() {
  const after = $("after");
  if (!page.isShown || !page.result || !after.naturalWidth) return;
  const { width, height } = $("loupe-after").getBoundingClientRect();
  const { zoom } = page.spot;
  const part = { width: Math.min(1, width / zoom / after.naturalWidth), height: Math.min(1, height / zoom / after.naturalHeight) };
  const left = clamp(page.spot.x - part.width / 2, 0, 1 - part.width);
  const top = clamp(page.spot.y - part.height / 2, 0, 1 - part.height);
  Object.assign(page.spot, { x: left + part.width / 2, y: top + part.height / 2 });
  const scale = zoom * after.naturalWidth;
  for (const [canvas, image] of [["loupe-before", $("before")], ["loupe-after", after]]) {
    const pen = fitted($(canvas), width, height);
    // Larger than the picture: it stands in the middle.
    const shift = { x: Math.max(0, width - scale) / 2, y: Math.max(0, height - zoom * after.naturalHeight) / 2 };
    pen.drawImage(image, shift.x - left * scale, shift.y - top * zoom * after.naturalHeight, scale, zoom * after.naturalHeight);
  }
  Object.assign($("marker").style, {
    left: `${page.spot.x * 100}%`,
    top: `${page.spot.y * 100}%`,
    width: `${part.width * 100}%`,
    height: `${part.height * 100}%`,
  });
}

function fitted(canvas, width, height) {
  canvas.width = Math.round(width * devicePixelRatio);
  canvas.height = Math.round(height * devicePixelRatio);
  const pen = canvas.getContext("2d");
  pen.scale(devicePixelRatio, devicePixelRatio);
  pen.imageSmoothingEnabled = false;
  return pen;
}

function moveMarker(event) {
  const step = event.shiftKey ? 0.1 : 0.02;
  const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] || [0, 0];
  if (!x && !y) return;
  event.preventDefault();
  lookAt(page.spot.x + x * step, page.spot.y + y * step);
}

// ---------------------------------------------------------------- what people do

function listen() {
  $("choose").onclick = $("other").onclick = () => $("file").click();
  $("file").onchange = () => (take($("file").files[0]), ($("file").value = ""));
  $("ask").onsubmit = (event) => (event.preventDefault(), $("start").disabled || start());
  $("model").onchange = showScales;
  $("ask").onchange = () => (settle(), noteLimits(), refresh());
  $("cancel").onclick = cancel;
  $("stop").onclick = () => (settle(), $("start").focus());
  $("access-form").onsubmit = (event) => {
    event.preventDefault();
    sessionStorage.setItem("kdsr-key", $("key").value.trim());
    askForOffer().then(() => page.offer && (page.file ? $("start") : $("choose")).focus());
  };
  document.onpaste = (event) => take([...event.clipboardData.files].find(({ type }) => type.startsWith("image/")));
  listenToDrops();
  $("slider").oninput = () => divide(Number($("slider").value));
  $("compare").onpointermove = $("compare").onpointerdown = (event) => {
    const box = $("compare").getBoundingClientRect();
    lookAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  };
  $("marker").onkeydown = moveMarker;
  $("zooms").replaceChildren(...[1, 2, 4, 8].map((zoom) => segment("zoom", zoom, `${zoom}×`, zoom === page.spot.zoom)));
  $("zooms").onchange = () => ((page.spot.zoom = chosen("zoom")), drawLoupe());
  addEventListener("resize", drawLoupe);
}

function noteLimits() {
  const wrong = tooLarge();
  if (wrong) complain(wrong, {});
}

function listenToDrops() {
  let depth = 0;
  const dragging = (change) => {
    depth = change === 0 ? 0 : Math.max(0, depth + change);
    $("stage").classList.toggle("dragging", depth > 0);
  };
  document.ondragenter = (event) => (event.preventDefault(), dragging(1));
  document.ondragleave = () => dragging(-1);
  document.ondragover = (event) => event.preventDefault();
  document.ondrop = (event) => (event.preventDefault(), dragging(0), take(event.dataTransfer.files[0]));
}

listen();
askForOffer();
