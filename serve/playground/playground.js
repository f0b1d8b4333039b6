// The playground: a history built by hand, and what the model recommends after it.

import {ask, idText, Refusal, useKey} from "./api.js";
import {because, element, icon, moved, named, score, strengths, tell, titleOf} from "./parts.js";

const TYPING_MS = 150;
const $ = (id) => document.getElementById(id);

let history = [];
let ranksBefore = null; // item id -> rank in the answer before; null before the first answer
const running = {search: null, recommend: null, similar: null};

// Asks, forgetting the call before of the same name; undefined when a later one took its place.
async function latest(name, method, path, body) {
  running[name]?.abort();
  const own = (running[name] = new AbortController());
  try {
    const found = await ask(method, path, body, own.signal);
    return own === running[name] ? found : undefined;
  } catch (error) {
    if (own !== running[name] || error.name === "AbortError") return undefined;
    throw error;
  }
}

function complain(refusal) {
  if (!(refusal instanceof Refusal)) throw refusal;
  if (refusal.status === 401) {
    $("key-form").hidden = false;
  }
  $("banner").textContent = refusal.message;
  $("banner").hidden = false;
}

function soon(action) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, TYPING_MS);
  };
}

// Search

async function search() {
  const query = $("search").value.trim();
  try {
    const found = await latest("search", "GET", `v1/items?limit=30&query=${encodeURIComponent(query)}`);
    if (found) showFound(query, found.answer);
  } catch (error) {
    complain(error);
  }
}

function showFound(query, {items, total}) {
  const count = `${total.toLocaleString()} ${total === 1 ? "item" : "items"}`;
  $("found").textContent = query ? `${count} found` : `Popular items, of ${total.toLocaleString()}`;
  $("results").replaceChildren(...items.map((item) => {
    const label = `Add ${titleOf(item)} to the history`;
    const button = element("button", {type: "button", classes: "item", "aria-label": label, on: {click: () => add(item)}}, [
      named(item), element("span", {classes: "plus", "aria-hidden": "true", text: "+"}),
    ]);
    return element("li", {}, [button]);
  }));
}

// History

function add(item) {
  change([...history, item]);
}

function remove(position) {
  change(history.filter((_, place) => place !== position), position < history.length - 1 ? `remove-${position}` : `remove-${position - 1}`);
}

function move(position, to, focus) {
  const next = [...history];
  next.splice(to, 0, ...next.splice(position, 1));
  change(next, focus);
}

function change(next, focus) {
  history = next;
  showHistory();
  if (focus) (document.querySelector(`[data-focus="${focus}"]:not(:disabled)`) ?? $("history-title")).focus();
  recommend();
}

function showHistory() {
  $("history-empty").hidden = history.length > 0;
  $("clear").hidden = history.length === 0;
  $("history").replaceChildren(...history.map((item, position) => {
    const title = titleOf(item);
    const up = icon("↑", `Move ${title} up`, `up-${position}`, () => move(position, position - 1, position > 1 ? `up-${position - 1}` : `down-${position - 1}`));
    const last = position === history.length - 1;
    const down = icon("↓", `Move ${title} down`, `down-${position}`, () => move(position, position + 1, position + 2 < history.length ? `down-${position + 1}` : `up-${position + 1}`));
    up.disabled = position === 0;
    down.disabled = last;
    return element("li", {data: {position}}, [named(item), element("span", {classes: "tools"}, [
      up, down, icon("✕", `Remove ${title}`, `remove-${position}`, () => remove(position)),
    ])]);
  }));
}

// Recommendations

function request() {
  const text = $("filter").value.trim();
  const body = {
    history: history.map((item) => item.item_id),
    k: $("k").valueAsNumber,
    include: ["score", "metadata"],
    explain: history.length > 0,
  };
  if ($("exclude-seen").value) body.exclude_seen = $("exclude-seen").value === "true";
  if ($("user").value) body.user_id = $("user").value;
  if (text) body.filter = JSON.parse(text);
  return body;
}

// Whether what is shown may be of another request than the one that the page says.
function waiting(is) {
  $("recommended").setAttribute("aria-busy", is);
}

async function recommend() {
  const asked = history;
  let body;
  waiting(true);
  try {
    body = request();
  } catch (error) {
    tell("filter", `Not JSON: ${error.message}`);
    $("options-box").open = true;
    waiting(false);
    return;
  }
  try {
    const found = await latest("recommend", "POST", "v1/recommend", body);
    if (!found) return;
    for (const field of ["filter", "k", "user", "history"]) tell(field, "");
    $("banner").hidden = true;
    $("key-form").hidden = true;
    show(found.answer, asked, found.milliseconds);
  } catch (error) {
    refused(error);
  }
  waiting(false);
}

// Each error of the problem beside the field that its JSON pointer names, the rest above the page.
function refused(error) {
  const told = {filter: [], k: [], user: [], history: []};
  const fieldOf = {filter: "filter", k: "k", user_id: "user", history: "history"};
  for (const {pointer, detail} of error.errors ?? []) {
    const [, first, ...rest] = pointer.split("/");
    if (fieldOf[first]) told[fieldOf[first]].push(rest.length ? `${pointer}: ${detail}` : detail);
  }
  for (const [field, texts] of Object.entries(told)) tell(field, texts.join("\n"));
  const placed = Object.values(told).flat().length;
  if (placed > told.history.length) $("options-box").open = true;
  if (placed === 0) complain(error);
  else $("banner").hidden = true;
  $("status").textContent = placed ? "refused, see the marked field" : "";
}

function show(answer, asked, milliseconds) {
  $("model").textContent = `${answer.model.name}  ·  version ${answer.model.version}  ·  ${answer.model.variant}`;
  $("status").textContent = `${answer.items.length} items in ${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms`;
  const notes = [...answer.warnings];
  if (answer.fallback_used) notes.unshift(asked.length ? "No item of the history is known: popular items instead." : "Without a history: the popular items.");
  if (answer.unknown_items.length) notes.push(`Unknown to the model: ${answer.unknown_items.map(idText).join(", ")}`);
  $("notes").replaceChildren(...notes.map((text) => element("li", {text})));
  $("notes").hidden = notes.length === 0;
  $("recommended-empty").hidden = answer.items.length > 0;
  const scores = answer.items.map((item) => item.score);
  const [least, most] = [Math.min(...scores), Math.max(...scores)];
  const share = (item) => (most > least ? 0.06 + (0.94 * (item.score - least)) / (most - least) : 1);
  $("recommended").replaceChildren(...answer.items.map((item) => ranked(item, share(item), asked)));
  ranksBefore = new Map(answer.items.map((item) => [idText(item.item_id), item.rank]));
}

function ranked(item, share, asked) {
  const bar = element("span", {classes: "bar"});
  bar.style.setProperty("--share", share);
  const explanation = item.explanation ?? [];
  const title = titleOf(item);
  const row = element("li", {classes: "ranked", on: {
    pointerenter: () => light(explanation), pointerleave: () => light([]), focusin: () => light(explanation), focusout: () => light([]),
  }}, [
    element("span", {classes: "rank number", text: item.rank}),
    named(item),
    element("span", {classes: "facts"}, [
      element("span", {classes: "score number", text: score(item.score), title: item.source === "popular" ? "events in training" : "score of the model"}),
      element("span", {classes: `source ${item.source === "model" ? "" : "other"}`, text: item.source}),
      ranksBefore ? moved(item.rank, ranksBefore.get(idText(item.item_id))) : "",
    ]),
    element("span", {classes: "tools"}, [
      icon("≈", `Items similar to ${title}`, `similar-${item.rank}`, () => similar(item)),
      icon("+", `Add ${title} to the history`, `add-${item.rank}`, () => add(item)),
    ]),
    bar,
  ]);
  if (explanation.length) row.append(because(explanation, asked));
  return row;
}

// Shades the events of the history by their effect on the item looked at.
function light(explanation) {
  const strength = strengths(explanation);
  for (const row of $("history").children) row.style.setProperty("--lit", strength.get(Number(row.dataset.position)) ?? 0);
}

// Similar items

async function similar(item) {
  $("similar-title").textContent = `Similar to ${titleOf(item)}`;
  $("similar-items").replaceChildren();
  tell("similar", "");
  if (!$("similar").open) $("similar").showModal();
  try {
    const body = {item_id: item.item_id, k: 10, include: ["score", "metadata"]};
    const found = await latest("similar", "POST", "v1/similar-items", body);
    if (!found) return;
    $("similar-items").replaceChildren(...found.answer.items.map((other) => element("li", {}, [
      named(other),
      element("span", {classes: "score number", text: score(other.score)}),
      element("span", {classes: "tools"}, [icon("+", `Add ${titleOf(other)} to the history`, "", () => add(other))]),
    ])));
  } catch (error) {
    if (error instanceof Refusal) tell("similar", error.message);
    else throw error;
  }
}

// Keys

function roam(event) {
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (!step) return;
  const buttons = [$("search"), ...$("results").querySelectorAll("button")];
  const next = buttons[buttons.indexOf(document.activeElement) + step];
  if (next) {
    event.preventDefault();
    next.focus();
  }
}

function listen() {
  $("search").addEventListener("input", soon(search));
  for (const id of ["search", "results"]) $(id).addEventListener("keydown", roam);
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter") $("results").querySelector("button")?.click();
  });
  document.addEventListener("keydown", (event) => {
    const typing = document.activeElement.matches("input, textarea, select");
    if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey || $("similar").open) return;
    event.preventDefault();
    $("search").focus();
  });
  $("options").addEventListener("input", () => waiting(true));
  $("options").addEventListener("input", soon(recommend));
  $("options").addEventListener("submit", (event) => event.preventDefault());
  $("clear").addEventListener("click", () => {
    change([]);
    $("search").focus();
  });
  $("similar-close").addEventListener("click", () => $("similar").close());
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey($("key").value);
    $("key").value = "";
    $("banner").hidden = true;
    search();
    recommend();
  });
}

$("options-box").open = matchMedia("(min-width: 760px)").matches;
listen();
showHistory();
search();
recommend();
