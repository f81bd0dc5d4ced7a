// Run again, share, save, history. Prompts and answers are untrusted, so they are inserted as text only.
const box = element.querySelector(".ml-kept");
const find = (name) => box.querySelector(name);
const link = find(".ml-link");
const copy = find(".ml-copy");
let saved = null;
let listed = "";

function list(history) {
  find(".ml-history-count").textContent = history.length ? "(" + history.length + ")" : "";
  find(".ml-history-empty").hidden = history.length > 0;
  find(".ml-history ol").replaceChildren(...history.map((one) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const facts = document.createElement("span");
    button.type = "button";
    button.className = "ml-past";
    button.append(one.prompt);
    facts.textContent = new Date(one.time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }) + " · " + one.names.join(", ");
    button.append(facts);
    button.addEventListener("click", () => trigger("select", { action: "restore", id: one.id }));
    item.append(button);
    return item;
  }));
}

function paint() {
  const now = props.value;
  if (!now || !now.history) return;
  for (const tool of box.querySelectorAll("[data-action]")) tool.disabled = !now.ready;
  find(".ml-tools-words").textContent = now.words;
  const hidden = !now.shared;
  if (now.shared) {
    const address = new URL(window.location.pathname, window.location.href);
    address.searchParams.set("shared", now.shared);
    link.value = address.href;
    copy.textContent = "Copy";
  }
  if (find(".ml-shared").hidden !== hidden) {
    find(".ml-shared").hidden = hidden;
    if (!hidden) link.select();
  }
  if (now.download && now.download !== saved) {
    window.minilora.save(now.download.name, new Blob([now.download.text], { type: now.download.type }));
  }
  saved = now.download;
  const history = JSON.stringify(now.history);
  if (history !== listed) list(now.history);
  listed = history;
}

box.addEventListener("click", (event) => {
  const action = event.target.closest("[data-action]")?.dataset.action;
  if (action === "again") trigger("submit");
  else if (action === "share") trigger("select", { action });
  else if (action) trigger("select", { action: "export", kind: action });
});
copy.addEventListener("click", async () => {
  await window.minilora.copy(link.value);
  copy.textContent = "Copied";
});
watch("value", paint);
paint();
