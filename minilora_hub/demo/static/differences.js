// Items on which two measured models differ. Names, prompts and answers are untrusted: they are inserted as text only.
const box = element.querySelector(".ml-differ");
const find = (name) => box.querySelector(name);
const make = (tag, name, text) => Object.assign(document.createElement(tag), { className: name, textContent: text ?? "" });
const named = (tag, scope, text) => Object.assign(make(tag, "", text), { scope });
const selects = [...box.querySelectorAll("select")];

function choices(select, options, chosen) {
  const kept = JSON.stringify(options);
  if (select.dataset.options !== kept) {
    select.replaceChildren(...options.map(([text, value]) => Object.assign(make("option", "", text), { value })));
    select.dataset.options = kept;
  }
  select.value = chosen ?? "";
}

function item(one) {
  const line = make("li", "ml-differ-item");
  const asked = make("p", "ml-differ-prompt");
  const run = make("button", "ml-tool", "Run it");
  run.type = "button";
  run.setAttribute("aria-label", `Run: ${one.prompt}`);
  run.addEventListener("click", () => {
    trigger("submit", { prompt: one.prompt });
    document.querySelector("#ml-line")?.scrollIntoView({ block: "start" });
  });
  asked.append(make("b", "", one.prompt), make("span", "", `${one.task}, difficulty ${one.difficulty}`), run);
  const answers = make("dl", "ml-differ-answers");
  const pair = (name, text, right) => {
    const answer = make("dd", right === undefined ? "" : right ? "ml-good" : "ml-bad");
    if (right !== undefined) answer.append(make("span", "", right ? "✓ right: " : "✗ wrong: "));
    answer.append(make("code", "", text.trim() || "(nothing)"));
    answers.append(make("dt", "", name), answer);
  };
  pair("right answer", one.reference);
  for (const name of Object.keys(one.answers)) pair(name, one.answers[name], one.right[name]);
  line.append(asked, answers);
  return line;
}

function group({ name, total, items }) {
  const part = make("section", "ml-differ-group");
  const list = make("ul", "");
  list.append(...items.map(item));
  part.append(make("h3", "", `Only ${name} is right: ${total}`), list);
  if (items.length < total) {
    const more = make("button", "ml-tool", `Show all ${total}`);
    more.type = "button";
    more.addEventListener("click", () => ask(total));
    part.append(more);
  }
  return part;
}

// The share of each expert of a mixture, for each task.
function routing([name, { layer, tasks }]) {
  const table = make("table", "ml-differ-table");
  table.append(make("caption", "", `Experts of ${name} in layer ${layer}, where the tasks differ most: share of the tokens`));
  const head = table.createTHead().insertRow();
  head.append(named("th", "col", "task"), ...tasks[0].load.map((_, expert) => named("th", "col", window.minilora.letterOf(expert))));
  const body = table.createTBody();
  for (const { task, load } of tasks) {
    body.insertRow().append(named("th", "row", task), ...load.map((share) => make("td", "", `${Math.round(100 * share)} %`)));
  }
  return table;
}

function paint() {
  const now = props.value;
  if (!now) return;
  find(".ml-differ-error").textContent = now.error;
  if (now.phase !== "shown") return;
  const models = now.names.map((name) => [name, name]);
  const options = {
    first: models,
    second: models,
    task: [["all", ""], ...now.tasks.map((task) => [task, task])],
    difficulty: [["all", ""], ...now.difficulties.map((one, at) => [one + (at ? (at === now.difficulties.length - 1 ? " (hardest)" : "") : " (easiest)"), String(one)])],
  };
  for (const select of selects) choices(select, options[select.name], now.asked[select.name]);
  find(".ml-differ-words").textContent = now.words;
  find(".ml-differ-routing").replaceChildren(...Object.entries(now.routing).map(routing));
  find(".ml-differ-groups").replaceChildren(...now.groups.map(group));
  find(".ml-differ-command code").textContent = now.command;
}

function ask(most) {
  const asked = Object.fromEntries(selects.map((select) => [select.name, select.value]));
  trigger("select", { ...asked, difficulty: asked.difficulty ? Number(asked.difficulty) : null, most });
}

const fold = element.querySelector(".ml-fold");
fold.addEventListener("click", () => {
  box.hidden = !box.hidden;
  fold.classList.toggle("open", !box.hidden);
  fold.setAttribute("aria-expanded", String(!box.hidden));
  if (!box.hidden && props.value.phase !== "shown") trigger("select", {});
});
for (const select of selects) select.addEventListener("change", () => ask());
watch("value", paint);
paint();
