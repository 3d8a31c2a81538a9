// What the page does in the browser: parts that change are replaced, times become ages, lists are searched while one types.
// Nothing here makes markup of text: HTML comes from this page's own server, which escapes, and log lines are text nodes.

const policy = window.trustedTypes
  ? window.trustedTypes.createPolicy("siderolink", { createHTML: (html) => html })
  : { createHTML: (html) => html };

function fragment(html) {
  const template = document.createElement("template");
  template.innerHTML = policy.createHTML(html);
  return template.content;
}

// --- changing as little as possible, so that focus, selection and scrolling stay

function patch(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  const isElement = old.nodeType === Node.ELEMENT_NODE && fresh.nodeType === Node.ELEMENT_NODE;
  if (!isElement || old.tagName !== fresh.tagName || old.id !== fresh.id) {
    old.replaceWith(fresh);
    return;
  }
  if (old.tagName === "TIME" && old.dataset.at === fresh.dataset.at) return;
  if (old.tagName === "INPUT" || old.tagName === "TEXTAREA" || old.tagName === "SELECT") return;
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  patchChildren(old, fresh);
}

function patchChildren(old, fresh) {
  const named = new Map();
  for (const child of old.children) if (child.id) named.set(child.id, child);
  let at = old.firstChild;
  for (const next of [...fresh.childNodes]) {
    const match = next.id ? named.get(next.id) : at && !at.id ? at : null;
    if (!match) {
      old.insertBefore(next, at);
      continue;
    }
    if (match === at) at = at.nextSibling;
    else old.insertBefore(match, at);
    patch(match, next);
  }
  while (at) {
    const following = at.nextSibling;
    at.remove();
    at = following;
  }
}

function replaceRegion(id, html) {
  const region = document.getElementById(id);
  if (!region) return;
  const fresh = region.cloneNode(false);
  fresh.append(fragment(html));
  patchChildren(region, fresh);
  showAges();
}

// --- ages

const units = [["d", 86400], ["h", 3600], ["m", 60], ["s", 1]];

function age(seconds) {
  const passed = Math.max(0, Math.abs(seconds));
  const [unit, size] = units.find(([, length]) => passed >= 2 * length) || ["s", 1];
  const shown = `${Math.floor(passed / size)}${unit}`;
  return seconds >= 0 ? `${shown} ago` : `in ${shown}`;
}

function showAges() {
  const now = Date.now() / 1000;
  for (const time of document.querySelectorAll("time[data-at]")) {
    const text = age(now - Number(time.dataset.at));
    if (time.textContent !== text) time.textContent = text;
    if (!time.title) time.title = time.dateTime;
  }
}

// --- the stream

const state = document.getElementById("live-state");
let source = null;

function tell(text, kind) {
  if (!state) return;
  if (state.textContent !== text) state.textContent = text;
  state.dataset.kind = kind;
}

function closeStream() {
  if (source) source.close();
  source = null;
}

function openStream() {
  closeStream();
  const url = document.body.dataset.live;
  if (!url) return;
  const stream = new EventSource(url);
  source = stream;
  const on = (name, handle) => stream.addEventListener(name, (message) => handle(JSON.parse(message.data)));
  on("region", ({ id, html }) => {
    tell("Live", "live");
    replaceRegion(id, html);
  });
  on("back", () => tell("Live", "live"));
  on("away", (text) => tell(`The server does not answer: ${text}. Trying again.`, "away"));
  on("stopped", (text) => {
    closeStream();
    tell(`Not live any more: ${text}.`, "stopped");
  });
  on("signed-out", () => {
    closeStream();
    location.assign(`/sign-in?next=${encodeURIComponent(location.pathname + location.search)}`);
  });
  on("log", addLines);
  on("log-stopped", (text) => addLines([["", "", text]]));
  stream.addEventListener("error", () => {
    if (stream !== source) return;
    if (stream.readyState === EventSource.CLOSED) tell("Not live any more; load the page again.", "stopped");
    else tell("The page's server does not answer. Trying again.", "away");
  });
}

document.addEventListener("visibilitychange", () => (document.hidden ? closeStream() : openStream()));
window.addEventListener("pagehide", closeStream);
window.addEventListener("pageshow", openStream);

// --- the kernel log: text, whatever it holds

const longestLog = 1000;

function addLines(lines) {
  const log = document.getElementById("log");
  if (!log) return;
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  for (const [at, level, message] of lines) {
    const line = document.createElement("div");
    const time = document.createElement("span");
    time.className = "at";
    time.textContent = at;
    line.append(time, ` ${level ? `${level}: ` : ""}${message}`);
    log.append(line);
  }
  while (log.children.length > longestLog) log.firstElementChild.remove();
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

// --- lists: search as one types, without loading the page again

let asked = 0;

async function search(form) {
  const number = ++asked;
  const query = new URLSearchParams();
  for (const [name, value] of new FormData(form)) if (value) query.set(name, value);
  const url = `${form.getAttribute("action")}${query.size ? `?${query}` : ""}`;
  let answer;
  try {
    answer = await fetch(url, { headers: { accept: "text/html" }, redirect: "error" });
  } catch {
    location.assign(url);
    return;
  }
  if (number !== asked) return;
  const text = await answer.text();
  if (number !== asked) return;
  const found = new DOMParser().parseFromString(policy.createHTML(text), "text/html");
  const id = form.dataset.searches;
  const fresh = found.getElementById(id);
  const region = document.getElementById(id);
  if (!fresh || !region) {
    location.assign(url);
    return;
  }
  patchChildren(region, document.adoptNode(fresh));
  showAges();
  history.replaceState(null, "", url);
  document.body.dataset.live = found.body.dataset.live;
  openStream();
}

for (const form of document.querySelectorAll("form[data-searches]")) {
  let timer = 0;
  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => search(form), 150);
  });
  form.addEventListener("submit", (submitted) => {
    submitted.preventDefault();
    clearTimeout(timer);
    search(form);
  });
}

// --- copying

for (const button of document.querySelectorAll("button[data-copies]")) {
  button.addEventListener("click", async () => {
    const shown = document.getElementById(button.dataset.copies);
    try {
      await navigator.clipboard.writeText(shown.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(shown);
      button.textContent = "Selected: copy it";
    }
  });
}

document.body.classList.add("has-script");
showAges();
setInterval(showAges, 1000);
if (!document.hidden) openStream();
