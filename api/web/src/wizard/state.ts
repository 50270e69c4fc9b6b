// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// What a wizard knows while it is open: the steps the API offers, the values so far, what is wrong with them.
import { useMutation, useQuery } from '@tanstack/react-query';
import { useNavigate } from '@tanstack/react-router';
import { useEffect, useMemo, useState } from 'react';

import { ApiError, call, path } from '../api/client';
import { refresh, useNodes } from '../api/queries';
import { canBeSet, useCallSchema, type Params } from '../api/schema';
import { useChoices, type Source } from '../forms/choices';
import type { Choice } from '../forms/Field';
import { checkFields, fieldParam, placeErrors, toParameters, type Values } from '../forms/values';
import { watchTask } from '../tasks/watch';
import { sentValues, type FieldSpec, type StepSpec, type WizardSpec } from './steps';

/** Known to the API, and of use on this board. */
function isOffered(params: Params, name: string): boolean {
  const param = fieldParam(params, name);
  return param !== undefined && canBeSet(param) && param.effect === undefined;
}

/** Steps as this API offers them: only its fields, and no empty step. */
function offered(spec: WizardSpec, params: Params) {
  return spec.steps
    .map((step) => ({ ...step, fields: step.fields.filter((field) => field.name === 'node' || field.own || isOffered(params, field.name)) }))
    .filter((step) => step.fields.length > 0);
}

/** What a field starts with once the choices are known: the first storage, bridge, template or node. */
function firstChoices(fields: FieldSpec[], choices: Map<Source, Choice[]>, values: Values): Values {
  const found: Values = {};
  for (const field of fields) {
    const first = field.source && choices.get(field.source)?.[0];
    const wants = field.needed || field.source === 'bridges' || field.source?.startsWith('storages/');
    if (first && wants && values[field.name] === undefined) found[field.name] = first.value;
  }
  return found;
}

/** Steps, choices and values; values that can be guessed (next id, first storage) are filled in as they arrive. */
export function useWizardState(spec: WizardSpec, startNode: string | undefined) {
  const schema = useCallSchema('POST', spec.path);
  const nodes = useNodes();
  const nextId = useQuery({ queryKey: ['/cluster/nextid'], queryFn: () => call<string | number>('GET', '/cluster/nextid'), staleTime: 0, gcTime: 0 });
  const [values, setValues] = useState<Values>({ ...spec.initial, ...(startNode ? { node: startNode } : {}) });
  const params = schema.data?.parameters;
  const steps = useMemo(() => (params ? offered(spec, params) : []), [spec, params]);
  const fields = useMemo(() => steps.flatMap((step) => step.fields), [steps]);
  const sources = useMemo(() => [...new Set(fields.map((field) => field.source).filter((source) => source !== undefined))], [fields]);
  const node = values['node'] ?? nodes.find((row) => row.status === 'online')?.node ?? null;
  const choices = useChoices(node, sources);
  useEffect(() => {
    setValues((all) => {
      const more = firstChoices(fields, choices, all);
      return Object.keys(more).length > 0 ? { ...all, ...more } : all;
    });
  }, [fields, choices]);
  useEffect(() => {
    if (nextId.data !== undefined) setValues((all) => (all['vmid'] === undefined ? { ...all, vmid: String(nextId.data) } : all));
  }, [nextId.data]);
  return { params, steps, choices, values, setValues, node, error: schema.error ?? nextId.error };
}

export function visible(step: StepSpec | undefined, values: Values): FieldSpec[] {
  return (step?.fields ?? []).filter((field) => !field.shown || field.shown(values));
}

/** What is wrong with the values, by field: by the schema, and by the server's last answer. */
export function findErrors(steps: StepSpec[], params: Params, values: Values, refusal: unknown): { wrong: Record<string, string>; refused: Record<string, string> } {
  const fields = steps.flatMap((step) => visible(step, values));
  const names = fields.map((field) => field.name);
  const needed = new Set(fields.filter((field) => field.needed).map((field) => field.name));
  return {
    wrong: checkFields(params, names, values, needed),
    refused: refusal instanceof ApiError ? placeErrors(refusal.errors, names) : {},
  };
}

/** The parameters that the wizard sends: only such as the API knows. */
export function parametersOf(spec: WizardSpec, params: Params, values: Values, start: boolean): Record<string, string> {
  const all = { ...sentValues(spec, values), ...(start ? { start: '1' } : {}) };
  return toParameters(params, Object.fromEntries(Object.entries(all).filter(([name]) => fieldParam(params, name) !== undefined)));
}

/** Sends it, then goes to the guest's page with the task's log open. */
export function useCreate(node: string | null, type: 'qemu' | 'lxc') {
  const navigate = useNavigate();
  return useMutation({
    mutationFn: (parameters: Record<string, string>) => call<string>('POST', path`/nodes/${node ?? ''}/${type}`, parameters),
    onSuccess: async (upid, parameters) => {
      void watchTask(upid);
      await navigate({ to: '/guests/$vmid', params: { vmid: parameters['vmid'] ?? '' }, search: { task: upid } });
      await refresh();
    },
  });
}
