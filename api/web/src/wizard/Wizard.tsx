// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Creates a guest step by step. Any step can be gone to at any time; the last one shows what will be sent.
import { Button, Checkbox, Group, Modal, Skeleton, Stack, Stepper, Table, Text } from '@mantine/core';
import { useMutation, useQuery } from '@tanstack/react-query';
import { useNavigate } from '@tanstack/react-router';
import { useEffect, useMemo, useState } from 'react';

import { ApiError, call, path } from '../api/client';
import { refresh, useNodes } from '../api/queries';
import { useCallSchema, type Params } from '../api/schema';
import { ErrorNote } from '../app/ErrorPage';
import { useChoices, type Source } from '../forms/choices';
import { Field, type Choice } from '../forms/Field';
import { checkFields, fieldParam, placeErrors, toParameters, type Values } from '../forms/values';
import { sentValues, WIZARDS, type FieldSpec, type WizardSpec } from './steps';

interface WizardProps {
  kind: 'vm' | 'ct';
  node: string | undefined;
  onClose: () => void;
}

/** Steps as this API offers them: only its fields, and no empty step. */
function offered(spec: WizardSpec, params: Params) {
  return spec.steps
    .map((step) => ({ ...step, fields: step.fields.filter((field) => field.name === 'node' || fieldParam(params, field.name)) }))
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

function useWizardState(spec: WizardSpec, startNode: string | undefined) {
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

function StepFields({ fields, params, values, errors, choices, onChange }: { fields: FieldSpec[]; params: Params; values: Values; errors: Record<string, string>; choices: Map<Source, Choice[]>; onChange: (name: string, value: string) => void }) {
  const shown = fields.filter((field) => !field.shown || field.shown(values));
  return (
    <div className="atoll-fields">
      {shown.map((field, index) => (
        <Field
          key={field.name}
          {...field}
          param={field.name === 'node' ? { type: 'string' } : (fieldParam(params, field.name) ?? { type: 'string' })}
          value={values[field.name] ?? ''}
          onChange={(value) => onChange(field.name, value)}
          error={errors[field.name]}
          choices={field.source ? (choices.get(field.source) ?? []) : undefined}
          needed={field.needed ?? false}
          autoFocus={index === 0}
        />
      ))}
    </div>
  );
}

function Review({ parameters, node }: { parameters: Record<string, string>; node: string | null }) {
  const rows = Object.entries({ node: node ?? '', ...parameters });
  return (
    <Table withTableBorder fz="sm" verticalSpacing={3}>
      <Table.Tbody>
        {rows.map(([name, value]) => (
          <Table.Tr key={name}>
            <Table.Th w={150} scope="row">
              {name}
            </Table.Th>
            <Table.Td className="atoll-value">{name === 'password' ? '••••••••' : value}</Table.Td>
          </Table.Tr>
        ))}
      </Table.Tbody>
    </Table>
  );
}

function useCreate(node: string | null, type: 'qemu' | 'lxc') {
  const navigate = useNavigate();
  return useMutation({
    mutationFn: (parameters: Record<string, string>) => call<string>('POST', path`/nodes/${node ?? ''}/${type}`, parameters),
    onSuccess: async (upid, parameters) => {
      await navigate({ to: '/guests/$vmid', params: { vmid: parameters['vmid'] ?? '' }, search: { task: upid } });
      await refresh();
    },
  });
}

export function Wizard({ kind, node: startNode, onClose }: WizardProps) {
  const spec = WIZARDS[kind];
  const { params, steps, choices, values, setValues, node, error } = useWizardState(spec, startNode);
  const [at, setAt] = useState(0);
  const [start, setStart] = useState(true);
  const [seen, setSeen] = useState<ReadonlySet<number>>(new Set());
  const create = useCreate(node, spec.type);
  const visible = (fields: FieldSpec[]) => fields.filter((field) => !field.shown || field.shown(values));
  const all = steps.flatMap((step) => visible(step.fields));
  const needed = new Set(all.filter((field) => field.needed).map((field) => field.name));
  const wrong = checkFields(params ?? {}, all.map((field) => field.name), values, needed);
  const refused = create.error instanceof ApiError ? placeErrors(create.error.errors, all.map((field) => field.name)) : {};
  const last = steps.length;
  const stepErrors = (index: number) => visible(steps[index]?.fields ?? []).filter((field) => (seen.has(index) && wrong[field.name]) || refused[field.name]);
  const parameters = toParameters(params ?? {}, { ...sentValues(spec, values), ...(start ? { start: '1' } : {}) });
  const go = (index: number) => {
    // Leaving a step forwards shows what is wrong in everything left behind.
    setSeen(new Set([...seen, ...Array.from({ length: Math.max(index, at + 1) }, (_, step) => step)]));
    setAt(Math.min(index, last));
  };
  const forward = () => {
    setSeen(new Set([...seen, at]));
    const here = visible(steps[at]?.fields ?? []).some((field) => wrong[field.name]);
    if (!here) go(at + 1);
  };
  const blocked = Object.keys(wrong).length > 0;
  return (
    <Modal opened onClose={onClose} title={spec.title} size={760} closeOnClickOutside={false}>
      {error && <ErrorNote error={error} title="The wizard cannot be offered" />}
      {!params && !error && <Skeleton h={260} />}
      {params && (
        <form
          noValidate
          onSubmit={(event) => {
            event.preventDefault();
            if (at < last) forward();
            else if (!blocked) create.mutate(parameters);
          }}
        >
          <Stepper active={at} onStepClick={go} size="xs" iconSize={24} wrap={false} mb="md">
            {steps.map((step, index) => (
              <Stepper.Step key={step.title} label={step.title} {...(stepErrors(index).length > 0 ? { color: 'red' } : {})} />
            ))}
            <Stepper.Step label="Confirm" />
          </Stepper>
          <Stack gap="sm" mih={280}>
            {at < last ? (
              <StepFields
                key={at}
                fields={steps[at]?.fields ?? []}
                params={params}
                values={{ ...values, node: node ?? '' }}
                errors={{ ...refused, ...(seen.has(at) ? wrong : {}) }}
                choices={choices}
                onChange={(name, value) => setValues((old) => ({ ...old, [name]: value }))}
              />
            ) : (
              <>
                <Review parameters={parameters} node={node} />
                {blocked && <Text size="sm" className="atoll-bad">Some steps still need a value; they are marked red.</Text>}
                <Checkbox size="xs" label="Start it when it is created" checked={start} onChange={(event) => setStart(event.currentTarget.checked)} />
                <ErrorNote error={create.error} title="It was not created" />
              </>
            )}
          </Stack>
          <Group justify="space-between" mt="md">
            <Button variant="default" onClick={onClose}>
              Cancel
            </Button>
            <Group gap="xs">
              <Button variant="default" disabled={at === 0} onClick={() => setAt(at - 1)}>
                Back
              </Button>
              <Button type="submit" disabled={at === last && blocked} loading={create.isPending}>
                {at < last ? 'Next' : 'Create'}
              </Button>
            </Group>
          </Group>
        </form>
      )}
    </Modal>
  );
}
