// What the page is, with links. Names are untrusted, so they are inserted as text only.
function paint() {
  const { title, base, link, facts, made } = props.value;
  element.querySelector("h1").textContent = title;
  element.querySelector(".ml-base-link").textContent = base;
  if (link) element.querySelector(".ml-base-link").href = link;
  element.querySelector(".ml-memory").textContent = facts;
  element.querySelector(".ml-made a").textContent = made.words;
  if (made.link) element.querySelector(".ml-made a").href = made.link;
}

element.querySelector(".ml-cards-link").addEventListener("click", () => {
  const button = document.querySelector("#ml-picker .ml-fold");
  if (button && !button.classList.contains("open")) button.click();
  setTimeout(() => button?.scrollIntoView({ block: "start" }), 300); // once it is open
});
watch("value", paint);
paint();
