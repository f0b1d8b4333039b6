// Pieces of the page. Whatever comes from the server or the user goes in by textContent, never as markup.

import {idText} from "./api.js";

const SHOWN_FIELDS = 3;
const SHOWN_EFFECTS = 3;

export function element(tag, {text, classes, data, on, ...attributes} = {}, children = []) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (classes) made.className = classes;
  Object.assign(made.dataset, data);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  for (const [name, listener] of Object.entries(on ?? {})) made.addEventListener(name, listener);
  made.append(...children);
  return made;
}

export function titleOf(item) {
  const title = item.metadata?.title;
  return typeof title === "string" && title.trim() ? title : idText(item.item_id);
}

// Title, and below it the id and the first few values of the other fields, whose names are in the tooltip.
export function named(item) {
  const fields = Object.entries(item.metadata ?? {})
    .filter(([name, value]) => name !== "title" && value !== null && typeof value !== "object" && String(value) !== "");
  const values = fields.slice(0, SHOWN_FIELDS).map(([, value]) => String(value));
  const below = titleOf(item) === idText(item.item_id) ? values : [idText(item.item_id), ...values];
  return element("span", {classes: "named", title: fields.map(([name, value]) => `${name}: ${value}`).join("\n")}, [
    element("span", {classes: "title", text: titleOf(item)}),
    element("span", {classes: "quiet below", text: below.join("  ·  ")}),
  ]);
}

export function icon(text, label, focus, click) {
  return element("button", {type: "button", classes: "icon", text, title: label, "aria-label": label, data: {focus}, on: {click}});
}

export function score(value) {
  return Math.abs(value) >= 1000 ? value.toFixed(0) : value.toFixed(2);
}

// Where an item stood in the answer before: how far it moved, or that it is new; nothing without an answer before.
export function moved(rank, before) {
  if (before === undefined) return element("span", {classes: "moved new", text: "new", title: "not in the answer before"});
  if (before === rank) return element("span", {classes: "moved"});
  const up = before > rank;
  const title = `was number ${before}`;
  return element("span", {classes: up ? "moved up" : "moved down", text: `${up ? "▲" : "▼"}${Math.abs(before - rank)}`, title});
}

// How much of the largest effect each event of an explanation has: 0 to 1 by its place in the history. The effect of an
// only event is null: there is nothing to compare with.
export function strengths(explanation) {
  const largest = Math.max(...explanation.map((one) => one.effect ?? 0));
  return new Map(explanation.map((one) => [one.position, one.effect === null ? 1 : one.effect / largest]));
}

// The events of the history that drove an item, as chips.
export function because(explanation, history) {
  const strength = strengths(explanation);
  const chips = explanation.slice(0, SHOWN_EFFECTS).map((one) => {
    const effect = one.effect === null ? "the only event" : `+${score(one.effect)}`;
    const title = one.effect === null ? "" : `Without it the score would be ${score(one.effect)} lower`;
    const chip = element("li", {classes: "chip", title}, [
      element("span", {classes: "chip-title", text: titleOf(history[one.position] ?? one)}),
      element("span", {classes: "number", text: ` ${effect}`}),
    ]);
    chip.style.setProperty("--strength", strength.get(one.position));
    return chip;
  });
  return element("ul", {classes: "because", "aria-label": "because of"}, chips);
}

// A message beside a field, tied to it for screen readers; an empty text takes it away.
export function tell(id, text) {
  const place = document.getElementById(`${id}-error`);
  place.textContent = text;
  place.hidden = !text;
  document.getElementById(id)?.toggleAttribute("aria-invalid", Boolean(text));
}
