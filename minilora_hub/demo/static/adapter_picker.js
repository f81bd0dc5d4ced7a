// The adapter picker. Names, licences and tasks are untrusted, so they are inserted as text only.
const form = element.querySelector(".ml-picker");
const find = (name) => form.querySelector(name);
const make = (tag, name, text) => {
  const one = document.createElement(tag);
  one.className = name;
  if (text !== undefined) one.textContent = text;
  return one;
};
const shown = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3).replace(/\.?0+$/, ""));
let painted = "";

function sparkline(loss) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const low = Math.min(...loss);
  const span = Math.max(...loss) - low || 1;
  const point = (value, index) => (1 + (118 * index) / (loss.length - 1)).toFixed(1) + "," + (27 - (26 * (value - low)) / span).toFixed(1);
  svg.setAttribute("viewBox", "0 0 120 28");
  svg.setAttribute("class", "ml-spark");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `training loss from ${shown(loss[0])} to ${shown(loss.at(-1))}`);
  line.setAttribute("points", loss.map(point).join(" "));
  svg.append(line);
  return svg;
}

function card(about, chosen) {
  const box = make("article", "ml-adapter");
  box.dataset.kind = about.kind;
  const label = make("label", "ml-pick");
  const check = document.createElement("input");
  check.type = "checkbox";
  check.name = "adapter";
  check.value = about.name;
  check.checked = chosen;
  label.append(check, make("span", "ml-adapter-name", about.name), make("span", "ml-adapter-kind", about.kind));
  box.append(label, make("p", "ml-adapter-facts", about.facts.join(" · ")));
  if (about.purpose) box.append(make("p", "ml-adapter-facts", about.purpose));
  if (about.loss.length > 1) {
    const row = make("div", "ml-losses");
    row.append(sparkline(about.loss), make("span", "", `training loss ${shown(about.loss[0])} → ${shown(about.loss.at(-1))}`));
    box.append(row);
  }
  if (about.scores.length) {
    const scores = make("dl", "ml-scores");
    for (const one of about.scores) {
      const value = shown(one.value) + (one.base === null ? "" : ` (base ${shown(one.base)})`) + (one.n ? `, n ${one.n}` : "");
      scores.append(make("dt", "", one.task), make("dd", "", value));
      scores.lastChild.title = one.metric;
    }
    box.append(scores);
  }
  if (about.trouble) box.append(make("p", "ml-adapter-facts", about.trouble));
  if (about.link) {
    const anchor = make("a", "ml-adapter-link", "On the Hub");
    anchor.href = about.link;
    anchor.rel = "noopener";
    box.append(anchor);
  }
  return box;
}

function paint() {
  const now = props.value;
  if (!now || !now.cards) return;
  const state = JSON.stringify([now.cards, now.chosen]);
  if (state !== painted) {
    find(".ml-adapters").replaceChildren(...now.cards.map((about) => card(about, now.chosen.includes(about.name))));
  }
  painted = state;
  find(".ml-picker-intro").textContent = `Choose 1 to ${now.limit} adapters to compare with ${now.base}.`;
  find(".ml-hub").hidden = find(".ml-search").hidden = !now.fetches;
  paintFound(now);
  find(".ml-picker-words").textContent = now.words;
  form.dataset.phase = now.phase;
  find(".ml-strong").disabled = now.phase === "busy";
  if (now.phase === "done") form.elements.hub.value = "";
}

// What is found on the Hub: added to the chosen ones with one click.
function paintFound(now) {
  const rows = (now.found || []).map((one) => {
    const row = make("li", "");
    const add = make("button", "ml-tool", "Add");
    add.type = "button";
    add.setAttribute("aria-label", `Add ${one.id}`);
    add.addEventListener("click", () => trigger("submit", { names: [...now.chosen, one.id] }));
    row.append(add, make("span", "ml-adapter-name", one.id), make("span", "ml-adapter-facts", one.facts));
    return row;
  });
  find(".ml-found").replaceChildren(...rows);
}

// How to use an adapter elsewhere, in a dialog.
const dialog = element.querySelector(".ml-usage");
function showUsage(about) {
  dialog.querySelector("h2").textContent = `Get ${about.repo || about.name}`;
  const ways = about.usage.map(({ label, text }) => {
    const way = make("section", "ml-way");
    const copy = make("button", "ml-tool", "Copy");
    copy.type = "button";
    copy.setAttribute("aria-label", `Copy: ${label}`);
    copy.addEventListener("click", () => window.minilora.copy(text).then(() => (copy.textContent = "Copied")));
    const code = make("pre", "", text);
    code.tabIndex = 0;
    way.append(make("h3", "", label), copy, code);
    return way;
  });
  if (about.link) {
    const anchor = make("a", "ml-adapter-link", "Its repo on the Hub, with its card");
    anchor.href = about.link;
    anchor.rel = "noopener";
    ways.push(anchor);
  } else ways.push(make("p", "ml-adapter-facts", "It is in no repo on the Hub: ./… stands for its folder."));
  dialog.querySelector(".ml-ways").replaceChildren(...ways);
  dialog.showModal();
}

const fold = element.querySelector(".ml-fold");
function unfold(open) {
  form.hidden = !open;
  fold.classList.toggle("open", open);
  fold.setAttribute("aria-expanded", String(open));
}
fold.addEventListener("click", () => unfold(form.hidden));

// Buttons of the columns: see column.js.
document.addEventListener("ml:adapter", ({ detail: { act, adapter } }) => {
  const now = props.value;
  const about = now.cards.find((one) => one.name === adapter);
  if (act === "use" && about) showUsage(about);
  if (act === "remove" && now.chosen.includes(adapter)) trigger("submit", { names: now.chosen.filter((name) => name !== adapter) });
  if (act === "add") {
    unfold(true);
    fold.scrollIntoView({ block: "start" });
    find(now.fetches ? "[name=hub]" : "[name=adapter]")?.focus({ preventScroll: true });
  }
});

find(".ml-search").addEventListener("click", () => trigger("search", { text: form.elements.hub.value }));
form.addEventListener("submit", (event) => {
  event.preventDefault();
  const names = [...form.querySelectorAll("[name=adapter]:checked")].map((one) => one.value);
  const hub = form.elements.hub.value.trim();
  if (hub) names.push(hub);
  trigger("submit", { names });
});
watch("value", paint);
paint();
