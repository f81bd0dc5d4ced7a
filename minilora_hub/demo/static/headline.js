function paint() {
  element.querySelector("h1").textContent = props.value.title;
  element.querySelector("p").textContent = props.value.facts;
}

watch("value", paint);
paint();
