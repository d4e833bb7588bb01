"use strict";
// All that the server says is put on the page as text, never as markup.
const at = (id) => document.getElementById(id);
const EVERY_MS = 2000, KEPT_EVENTS = 60;
let timer = 0, streaming = false;

function make(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
}

function ask(path, more) {
  const key = sessionStorage.getItem("key");
  return fetch(path, { headers: key ? { Authorization: "Bearer " + key } : {}, cache: "no-store", ...more });
}

async function read(path) {
  const answer = await ask(path);
  if (answer.status === 401 || answer.status === 403) throw new Error("key");
  return answer.json();
}

function size(bytes) {
  if (bytes === null || bytes === undefined) return "";
  for (const [unit, step] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20]])
    if (bytes >= step) return (bytes / step).toFixed(1) + " " + unit;
  return Math.round(bytes / 1024) + " KiB";
}

function span(seconds) {
  if (seconds < 120) return Math.round(seconds) + " s";
  if (seconds < 7200) return Math.round(seconds / 60) + " min";
  return seconds < 172800 ? Math.round(seconds / 3600) + " h" : Math.round(seconds / 86400) + " d";
}

function problem(each) {
  const box = make("div", undefined, "problem");
  box.append(make("div", each.what), make("small", each.hint));
  return box;
}

function bar(device) {
  const box = make("div", undefined, "bar");
  const kept = device.reserved_bytes - device.lent_bytes - device.releasing_bytes;
  const parts = [["kept", kept], ["lent", device.lent_bytes], ["leaving", device.releasing_bytes], ["others", device.foreign_bytes]];
  for (const [name, bytes] of parts) {
    const part = make("i", undefined, name);
    part.style.width = (100 * Math.max(0, bytes)) / device.total_bytes + "%";
    box.append(part);
  }
  const limit = make("b");
  limit.style.left = Math.min(99.5, (100 * device.limit_bytes) / device.total_bytes) + "%";
  limit.title = "limit " + size(device.limit_bytes);
  box.append(limit);
  return box;
}

function holder(name, bytes) {
  const line = make("li");
  line.append(make("span", name), make("span", size(bytes)));
  return line;
}

function card(device) {
  const box = make("article", undefined, "card");
  const facts = [size(device.reserved_bytes) + " promised of " + size(device.total_bytes), size(device.room_bytes) + " room"];
  if (device.foreign_bytes > 0) facts.push(size(device.foreign_bytes) + " others");
  if (device.utilization !== null) facts.push(Math.round(100 * device.utilization) + " % busy");
  if (device.temperature_c !== null) facts.push(device.temperature_c + " °C");
  const list = make("ul", undefined, "holders");
  for (const each of device.instances) list.append(holder(each.instance, each.reserved_bytes));
  for (const each of device.foreign) list.append(holder(each.name + " (pid " + each.pid + ")", each.bytes));
  box.append(make("h3", device.id + " · " + device.name), bar(device), make("div", facts.join(" · "), "quiet"), list);
  return box;
}

function row(entry) {
  const own = entry.offloadd, line = make("tr"), sum = (pick) => own.instances.reduce((all, each) => all + pick(each), 0);
  const state = make("td");
  state.append(make("span", own.state, "word " + own.state));
  const cells = [
    ["busy", own.instances.length ? sum((each) => each.load) + "/" + sum((each) => each.slots) : ""],
    ["queue", own.waiting || ""],
    ["memory", own.instances.length ? size(sum((each) => each.reserved_bytes)) : ""],
  ].map(([name, text]) => { const cell = make("td", text); cell.dataset.name = name; return cell; });
  const why = make("td", own.hint ? own.reason + " (" + own.hint + ")" : own.reason, "why");
  line.append(make("td", entry.id), state, ...cells, why);
  return line;
}

function word(text) {
  at("status").textContent = text;
  at("status").className = "word " + text;
}

async function look() {
  clearTimeout(timer);
  try {
    const [health, models, vram] = await Promise.all([read("health"), read("models"), read("vram/status")]);
    word(health.status);
    at("about").textContent = "version " + health.version + ", up " + span(health.uptime_s) + ", config generation " + health.generation;
    at("problems").replaceChildren(...health.problems.map(problem));
    at("devices").replaceChildren(...vram.devices.map(card));
    const off = (entry) => entry.offloadd.state === "off";
    at("models").replaceChildren(...[...models.data].sort((a, b) => off(a) - off(b) || a.id.localeCompare(b.id)).map(row));
    at("main").hidden = false;
    at("key").hidden = true;
    if (!streaming) follow();
  } catch (error) {
    const locked = error.message === "key";
    at("key").hidden = !locked;
    at("main").hidden = locked;
    if (!locked) { word("unreachable"); at("about").textContent = "no answer; trying again"; }
  }
  timer = setTimeout(look, EVERY_MS);
}

function happened(event) {
  const line = make("li"), when = new Date((event.at || Date.now() / 1000) * 1000);
  line.append(make("time", when.toLocaleTimeString()), make("span", event.message || event.kind));
  at("events").prepend(line);
  while (at("events").children.length > KEPT_EVENTS) at("events").lastChild.remove();
}

// By fetch and not EventSource, which cannot send the key.
async function follow() {
  streaming = true;
  try {
    const answer = await ask("events");
    if (!answer.ok) throw new Error(answer.status);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { value, done } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop().slice(-65536);
      for (const text of events) {
        const data = text.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
        if (data) happened(JSON.parse(data));
      }
      look();
    }
  } catch { /* looked at again below */ }
  setTimeout(() => { streaming = false; }, 5000);
}

at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", at("secret").value);
  at("secret").value = "";
  look();
});
look();
