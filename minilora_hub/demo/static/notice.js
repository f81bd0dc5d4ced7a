// The result of ?adapter= or ?shared= in the page's address. Links are untrusted: the message is inserted as text only.
const box = element.querySelector(".ml-notice");

function paint() {
  const now = props.value;
  box.dataset.phase = (now && now.phase) || "none";
  box.querySelector(".ml-notice-words").textContent = (now && now.words) || "";
  const back = box.querySelector(".ml-notice-back");
  back.hidden = !["shown", "stored"].includes(box.dataset.phase);
  back.textContent = box.dataset.phase === "stored" ? "New comparison" : "Show this page's own adapters";
}

watch("value", paint);
paint();
