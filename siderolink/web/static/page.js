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

function patchRows({ id, order, rows }) {
  const body = document.getElementById(id);
  if (!body) return;
  const kept = new Map();
  for (const row of body.children) kept.set(row.id, row);
  let at = body.firstElementChild;
  for (const one of order) {
    const name = `machine-${one}`;
    const fresh = rows[one] && fragment(rows[one]).querySelector("tr");
    const row = kept.get(name) || fresh;
    if (!row) continue; // it comes with what is told next
    kept.delete(name);
    if (row === at) at = at.nextElementSibling;
    else body.insertBefore(row, at);
    if (fresh && fresh !== row) patch(row, fresh);
  }
  for (const row of kept.values()) row.remove();
  numberRows();
  showAges();
}

// Where a table shows some of many rows, a screen reader is told which.
function numberRows() {
  for (const table of document.querySelectorAll("table[data-rows]")) {
    const told = table.querySelector("[data-total]");
    const body = document.getElementById(table.dataset.rows);
    if (!told || !body) continue;
    const first = Number(told.dataset.first);
    table.setAttribute("aria-rowcount", Number(told.dataset.total) + 1);
    [...body.rows].forEach((row, index) => row.setAttribute("aria-rowindex", first + index + 1));
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
  on("rows", (news) => {
    tell("Live", "live");
    patchRows(news);
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

function search(form) {
  const query = new URLSearchParams();
  for (const [name, value] of new FormData(form)) if (value) query.set(name, value);
  return load(form, `${form.getAttribute("action")}${query.size ? `?${query}` : ""}`, false);
}

async function load(form, url, isStep) {
  const number = ++asked;
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
  const had = region.contains(document.activeElement) ? document.activeElement : null;
  patchChildren(region, document.adoptNode(fresh));
  numberRows();
  showAges();
  if (had && !had.matches("[href], [tabindex]")) region.querySelector("[tabindex]")?.focus();
  if (isStep) history.pushState(null, "", url);
  else history.replaceState(null, "", url);
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

// Links of a list, as those of its pages, lead to another part of it without loading the page again.
document.addEventListener("click", (clicked) => {
  const link = clicked.target.closest("a[data-list][href]");
  const form = link && document.querySelector("form[data-searches]");
  if (!form || clicked.button || clicked.ctrlKey || clicked.metaKey || clicked.shiftKey || clicked.altKey) return;
  clicked.preventDefault();
  showQuery(form, link.getAttribute("href"));
  load(form, link.getAttribute("href"), true);
  const region = document.getElementById(form.dataset.searches);
  if (region.getBoundingClientRect().top < 0) region.scrollIntoView();
});

window.addEventListener("popstate", () => {
  const form = document.querySelector("form[data-searches]");
  if (!form) return;
  showQuery(form, location.href);
  load(form, location.pathname + location.search, false);
});

function showQuery(form, url) {
  const query = new URL(url, location.href).searchParams;
  for (const field of form.elements) {
    if (field.name) field.value = query.get(field.name) ?? (field.name === "sort" ? "name" : "");
  }
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
numberRows();
showAges();
setInterval(showAges, 1000);
if (!document.hidden) openStream();
