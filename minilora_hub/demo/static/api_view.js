// Show the description of the API at /?view=api. Gradio 6.31 loads it only when its button is used, not by the address.

if (new URLSearchParams(location.search).get("view") === "api") {
  const waiting = setInterval(() => {
    const button = document.querySelector("button.show-api");
    if (!button) return;
    clearInterval(waiting);
    button.click(); // closes what the address has opened empty
    button.click();
  }, 100);
}
